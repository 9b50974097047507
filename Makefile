# `make demo` and `make test` set up everything they need on their first run.
# the first of these that is Python 3.11 or 3.12; or say make PYTHON=...
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
# processes that run the tests, a thread each
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# the oldest torch and triton that pyproject.toml allows
OLDEST := .venv.oldest

.PHONY: demo proof heads-proof test test-clusters test-oldest gpu setup lint clean

demo: $(STAMP)
	$(BIN)/dune-fast distill experiment=demo train.overwrite=true

# trains and evaluates on two cores in 90 minutes, a page in bench/results/proof/; or say make proof MINUTES=30
proof: $(STAMP)
	$(BIN)/python -m bench.proof $(if $(MINUTES),--minutes $(MINUTES))

# trains MASt3R's and Multi-HMR's heads on drawn data in 23 minutes, a core each; pages in bench/results/heads/
heads-proof: $(STAMP)
	OMP_NUM_THREADS=1 $(MAKE) -j 2 heads-proof-mast3r heads-proof-multihmr

heads-proof-%: $(STAMP)
	$(BIN)/python -m bench.heads_proof $*

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

# as root on Linux: two hosts made of namespaces, ssh and SLURM on them, S3, MLflow and W&B beside
# them, what runs survive there; 30 minutes.
# In a container of Debian it installs what it needs; where systemd would start these services, it says what is missing
test-clusters: $(STAMP)
	@test "$$(id -u)" != 0 -o -d /run/systemd/system || command -v slurmctld >/dev/null \
	  || ! command -v apt-get >/dev/null || { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y \
	    --no-install-recommends openssh-server pdsh slurm-wlm munge iproute2 util-linux; }
	test -d .services || $(BIN)/pip install -q --target .services -c constraints.txt 'moto[s3]' flask flask-cors s3fs mlflow wandb
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/.services timeout -k 60 3000 $(BIN)/python -m pytest -q --clusters tests/clusters

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n $(JOBS) --dist loadfile

# on a CUDA GPU: tests and measures everything, a page in bench/results/<device>/; or say make gpu MINUTES=60, PART=3
gpu: $(STAMP)
	$(BIN)/python -m bench.gpu $(if $(MINUTES),--minutes $(MINUTES)) $(if $(PART),--part $(PART))

setup: $(STAMP)

$(STAMP): constraints.txt
$(OLDEST)/.installed: constraints-oldest.txt constraints.txt

# the first constraint on a package counts: those of the oldest set go before the others
%/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "dune_fast needs Python 3.11 or 3.12; say make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $*/bin/python || $(PYTHON) -m venv $*
	awk -F== '!seen[$$1]++' $(filter constraints%,$^) > $*/constraints.txt
	$*/bin/python -m pip install --disable-pip-version-check -c $*/constraints.txt torch
	$*/bin/python -m pip install --disable-pip-version-check -c $*/constraints.txt -e '.[dali,demo,test]'
	$*/bin/python -m dune_fast.teachers.torchvision_operators
	touch $@

lint: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check ruff
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info
