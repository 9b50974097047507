"""MASt3R: two views to pointmaps, confidences, matches and a relative pose."""
