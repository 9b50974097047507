"""A run beside real services: images in S3 (moto's server), MLflow, Weights & Biases; up, down, frozen, refusing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dune_fast.engine.metrics import read_metrics
from tests.clusters.runs import ROOT, TRAIN, last_step
from tests.clusters.two_hosts import wait_until
from tests.engine.conftest import small_run

pytestmark = pytest.mark.clusters
STEPS = 200


def start(folder: Path, photos, *more: str, **variables: str) -> subprocess.Popen:
    """The small run, one process; its output in FOLDER.log."""
    changes = [f"train.steps={STEPS}", "train.checkpoint_every=100", "logging.tensorboard=false"]
    overrides = [x for x in small_run(folder, folder) if not x.startswith("data.datasets.images.root=")]
    root = f"data.datasets.images.root={photos}"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    environment |= {"OMP_NUM_THREADS": "1", "DUNE_FAST_CONFIGS": str(ROOT / "bench" / "toy")}
    with folder.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, TRAIN, *overrides, root, *changes, *more], cwd=ROOT, stdout=log, stderr=log,
            env=environment,
        )  # fmt: skip


def finish(process: subprocess.Popen, folder: Path, status: int = 0) -> str:
    """Waits for the end; what it said."""
    try:
        found = process.wait(600)
    finally:
        process.kill()
    said = folder.with_suffix(".log").read_text()
    assert found == status, said[-3000:]
    return said


def reach(folder: Path, step: int) -> float:
    """Waits for a step; the seconds."""
    return wait_until(lambda: last_step(folder) >= step, f"step {step} of {folder}", 120.0)


@pytest.fixture(scope="module")
def local(photos, tmp_path_factory) -> Path:
    """The run that reads the photographs from the disk."""
    folder = tmp_path_factory.mktemp("local") / "run"
    finish(start(folder, photos), folder)
    return folder


def same(run: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "student.safetensors") for folder in (run, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class S3:
    """The server, and what a client needs to find it."""

    def __init__(self, folder: Path) -> None:
        self.mood_file = folder / "mood"
        self.mood("well")
        script = str(Path(__file__).with_name("s3_server.py"))
        with (folder / "server.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, script, str(self.mood_file)], stdout=subprocess.PIPE, stderr=log, text=True
            )
        with self.process.stdout:
            port = self.process.stdout.readline().strip()
        assert port, (folder / "server.log").read_text()
        self.variables = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "first", "AWS_SECRET_ACCESS_KEY": "secret", "DUNE_FAST_CACHE": str(folder / "cache"),
        }  # fmt: skip

    def mood(self, text: str) -> None:
        """What the server does from now on."""
        new = self.mood_file.with_name("new")
        new.write_text(text)
        new.replace(self.mood_file)


@pytest.fixture(scope="module")
def s3(photos, tmp_path_factory) -> Iterator[S3]:
    """Has the photographs in s3://bucket/photos."""
    pytest.importorskip("moto", reason="moto is not installed: pip install 'moto[s3]' flask flask-cors s3fs")
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'moto[s3]' flask flask-cors s3fs")
    import boto3

    server = S3(tmp_path_factory.mktemp("s3"))
    try:
        client = boto3.client(
            "s3", endpoint_url=server.variables["AWS_ENDPOINT_URL"], region_name="us-east-1", aws_access_key_id="first",
            aws_secret_access_key="secret",
        )  # fmt: skip
        client.create_bucket(Bucket="bucket")
        for path in photos.iterdir():
            client.upload_file(str(path), "bucket", f"photos/{path.name}")
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(autouse=True)
def well_again(request) -> Iterator[None]:
    yield
    if "s3" in request.fixturenames:
        request.getfixturevalue("s3").mood("well")


@pytest.mark.parametrize("mood", ["well", "busy", "frozen", "expired first"])
def test_images_in_s3_give_the_run_of_the_disk(s3, local, row, tmp_path, mood):
    """Whatever the storage does in between; renewed credentials are those of the file that AWS's tools read."""
    run, keys, variables = tmp_path / "run", tmp_path / "credentials", dict(s3.variables)
    row.note = mood
    del variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"]
    variables["AWS_SHARED_CREDENTIALS_FILE"] = str(keys)
    keys.write_text("[default]\naws_access_key_id = first\naws_secret_access_key = secret\n")
    if mood == "busy":
        s3.mood(mood)
    process = start(run, "s3://bucket/photos", **variables)
    if mood.startswith(("frozen", "expired")):
        reach(run, 20)
        s3.mood(mood)
        time.sleep(8.0)
        assert last_step(run) < STEPS
        if mood == "frozen":
            s3.mood("well")
        else:
            keys.write_text("[default]\naws_access_key_id = second\naws_secret_access_key = secret\n")
    finish(process, run)
    same(run, local)


@pytest.mark.parametrize(
    ("mood", "root", "said"),
    [
        ("forbidden", "s3://bucket/photos", "give credentials that may read it"),
        ("well", "s3://none/photos", "does not exist"),
        ("well", "s3://bucket/none", "not there"),
    ],
)
def test_a_refusal_is_a_sentence(s3, row, tmp_path, mood, root, said):
    row.note = f"{mood}, {root}"
    s3.mood(mood)
    text = finish(start(tmp_path / "run", root, **s3.variables), tmp_path / "run", status=2)
    assert said in text and "Traceback" not in text and len(text.strip().splitlines()) < 4, text


def test_nobody_listens_at_the_storage(s3, row, tmp_path):
    began = time.monotonic()
    variables = s3.variables | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}
    text = finish(start(tmp_path / "run", "s3://bucket/photos", **variables), tmp_path / "run", status=2)
    row.seconds = time.monotonic() - began
    assert "Traceback" not in text and "see that the storage answers" in text.splitlines()[-1], text


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture
def frozen_port() -> Iterator[int]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


def service(name: str, port: int) -> tuple[str, dict[str, str]]:
    """The override and the variables that send a run's numbers to a port."""
    pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}")
    address = f"http://127.0.0.1:{port}"
    if name == "mlflow":
        return "logging.mlflow_experiment=mine", {"MLFLOW_TRACKING_URI": address}
    return "logging.wandb_project=mine", {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40}


@pytest.mark.parametrize("state", ["down", "frozen"])
@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_service_that_does_not_answer_holds_up_no_step(photos, local, row, tmp_path, name, state, frozen_port):
    run = tmp_path / "run"
    override, variables = service(name, free_port() if state == "down" else frozen_port)
    row.note = f"{name} {state}"
    began = time.monotonic()
    process = start(run, photos, override, **variables)
    reach(run, STEPS)
    steps = time.monotonic() - began
    text = finish(process, run)
    row.seconds = time.monotonic() - began - steps
    assert row.seconds < 60 and "gets none of this run's numbers (metrics.jsonl does)" in text, text[-3000:]
    assert steps < 60
    same(run, local)


def test_mlflow_gets_every_number(photos, row, tmp_path):
    run, port = tmp_path / "run", free_port()
    override, variables = service("mlflow", port)
    store = f"sqlite:///{tmp_path}/store.db"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--backend-store-uri", store, "--artifacts-destination", str(tmp_path / "artifacts")],
            cwd=tmp_path, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(lambda: answers(port) or server.poll() is not None, f"MLflow ({tmp_path}/server.log)", 120.0)
        assert server.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
        finish(start(run, photos, override, **variables), run)
        import mlflow

        client = mlflow.MlflowClient(variables["MLFLOW_TRACKING_URI"])
        (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
        history = client.get_metric_history(found.info.run_id, "loss")
        records = read_metrics(run / "metrics.jsonl")
        assert found.info.status == "FINISHED" and len(history) == STEPS
        assert [x.value for x in history] == pytest.approx([record["loss"] for record in records])
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_wandb_offline_keeps_its_files(photos, row, tmp_path):
    run = tmp_path / "run"
    override, variables = service("wandb", 9)
    finish(start(run, photos, override, **variables | {"WANDB_MODE": "offline"}), run)
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    shutil.rmtree(run / "wandb")
    assert json.loads((run / "state.json").read_text())["state"] == "finished"
