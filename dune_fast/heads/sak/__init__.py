"""SAK's second stage: routers that mix trunk and teachers for every task, decode heads, task losses."""
