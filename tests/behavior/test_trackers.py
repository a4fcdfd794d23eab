"""Trackers follow a run: real clients, a real MLflow server, kills, servers that are silent, refuse or lose answers.

What a tracker must have is taken from metrics.jsonl: one row for each line with numbers, in the order of the file.
"""

import contextlib
import http.server
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import trackers
import training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from titan_cpt.cli import main
from titan_cpt.common.signals import StopRequest
from titan_cpt.config.load import load_run
from titan_cpt.errors import ConfigError
from titan_cpt.tracking.follower_process import require_clients, trackers_following
from titan_cpt.tracking.send_runs import send_runs

for client in ("wandb", "mlflow", "trackio"):
    pytest.importorskip(client)

LOSS = "train/loss_nats_per_token"
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def mlflow_address(tmp_path_factory):
    with trackers.mlflow_server(tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a run that was trained without a tracker, and its config."""
    folder = tmp_path_factory.mktemp("plain")
    raw = training.two_stages(training.write_languages(folder), folder)
    outcome = training.train(training.write_config(raw, folder / "c.toml"))
    assert outcome.status == 0, outcome.output
    return folder / "run"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No settings and credentials of the machine; trackio's database in the test's folder."""
    for name in [*os.environ]:
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "HF_TOKEN")):
            monkeypatch.delenv(name)
    for name, value in {"TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def copy_of(run, to):
    shutil.copytree(run, to / "run")
    return to / "run"


def losses(run):
    """(run step, training loss) of every line of metrics.jsonl, those of undone steps included."""
    return [(line["run_step"], line["loss_nats_per_token"]) for line in training.lines_of(run, "train")]


def wandb_losses(run):
    rows, _ = trackers.wandb_rows(run)
    assert [row["_step"] for row in rows] == sorted({row["_step"] for row in rows}), "wandb drops steps that go back"
    return [(row["run_step"], row[LOSS]) for row in rows if LOSS in row]


def trackio_losses(tmp_path, project="titan_cpt"):
    rows = trackers.trackio_rows(tmp_path / "trackio", project)
    assert len({run for run, _, _ in rows}) == 1
    return [(step, values[LOSS]) for _, step, values in rows if LOSS in values]


def mlflow_runs(address, experiment):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(address)
    found = client.get_experiment_by_name(experiment)
    return client, [] if found is None else client.search_runs([found.experiment_id])


def mlflow_losses(address, experiment):
    """Sorted by step: the values of one step have one order in the database and another in the file."""
    client, runs = mlflow_runs(address, experiment)
    assert len(runs) == 1
    return sorted((point.step, point.value) for point in client.get_metric_history(runs[0].info.run_id, LOSS))


def track(run, *words):
    command = [sys.executable, "-m", "titan_cpt", "track", str(run), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def processes_with(text):
    """Process ids whose command line contains a text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text in (folder / "cmdline").read_text() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_for(what, seconds=60.0):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def position(run, tracker):
    path = run / "trackers" / f"{tracker}.json"
    return json.loads(path.read_text())["lines"] if path.exists() else 0


class Follower:
    """A follower process, as the trainer starts it."""

    def __init__(self, run, tracker, *words):
        command = [sys.executable, "-m", "titan_cpt.tracking.follower", str(run), tracker, *words]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def __enter__(self):
        """It runs."""
        return self

    def __exit__(self, *_):
        """Kill it, and the processes that its client started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait()

    def end(self):
        self.process.stdin.close()
        return self.process.wait(60)


def test_a_killed_and_resumed_run_is_one_run_in_every_tracker_without_gaps_or_doubles(tmp_path, mlflow_address):
    """kill -9 in the second stage; the steps that are trained again are there twice, as in metrics.jsonl.

    One learning rate is that of all weights, `*`, which is no name of a metric in MLflow.
    """
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["stages"][1]["lr_scale"] = {"*": 0.5}
    raw["metrics"] |= {
        "enable_tensorboard": True,
        "wandb": {"mode": "offline", "tags": "a"},
        "trackio": {},
        "mlflow": {"tracking_uri": mlflow_address, "experiment": "resumed", "tags": {"team": "x"}},
    }
    config = training.write_config(raw, tmp_path / "c.toml")
    fault = training.Fault("titan_cpt.train:record_step", call=19, once_written=tmp_path / "run/german/step-00000004")
    assert training.train(config, fault=fault).status == -signal.SIGKILL
    outcome = training.train(config)
    assert outcome.status == 0, outcome.output
    run = tmp_path / "run"

    expected = losses(run)
    assert len(expected) > 22, "steps were trained again"
    assert wandb_losses(run) == trackio_losses(tmp_path) == expected
    assert mlflow_losses(mlflow_address, "resumed") == sorted(expected)
    rows, ids = trackers.wandb_rows(run)
    assert len(ids) == 2
    assert len({*ids}) == 1
    _, (in_mlflow,) = mlflow_runs(mlflow_address, "resumed")
    assert in_mlflow.info.status == "FINISHED"
    assert in_mlflow.data.tags["team"] == "x"
    assert in_mlflow.data.metrics["lr_by_group/all"] == pytest.approx(1e-4)
    assert in_mlflow.data.params["training.seq_len"] == "16"
    assert in_mlflow.data.params["stages.german.replay.fraction"] == "0.25"
    assert (
        int(in_mlflow.data.params["plan.parameters"])
        == json.loads((run / "plan.json").read_text())["model"]["parameters"]
    )
    assert trackers.wandb_config(run)["stages"]["german"]["replay"]["fraction"] == 0.25
    assert {row["tokens"] for row in rows if row["run_step"] == 22} == {22 * 4 * 16}
    final = json.loads((run / "summary.json").read_text())["stages"][1]["forgetting"]["en"]
    assert in_mlflow.data.metrics["final/german/en/forgetting"] == final
    names = {name for row in rows for name in row if not name.startswith(("_", "event/"))}
    tags = EventAccumulator(str(run / "tb")).Reload().Tags()["scalars"]
    assert names - {"run_step", "tokens"} <= {*tags}
    name = "validation/de/loss_nats_per_token"
    lines = [line for line in training.lines_of(run, "validation") if line["dataset"] == "de"]
    assert [row[name] for row in rows if name in row] == [line["loss_nats_per_token"] for line in lines]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_killed_follower_is_continued_by_track(plain, tmp_path, tracker):
    """Everything is there once: what the killed process had not finished is sent again."""
    run = copy_of(plain, tmp_path)
    mode = ["--metrics.wandb.mode", "offline"] if tracker == "wandb" else ["--metrics.trackio.project", "titan_cpt"]
    whole = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(whole[:20]))
    with Follower(run, tracker, "--override", mode[0][2:], mode[1]):
        if tracker == "wandb":
            wait_for(lambda: [*run.glob("trackers/wandb/offline-*/*.wandb")])
            time.sleep(3)  # the rows were handed to wandb, which writes them to the file seconds later
        else:
            wait_for(lambda: position(run, "trackio") == 20)
    (run / "metrics.jsonl").write_text("".join(whole))

    assert track(run, *mode).returncode == 0
    again = track(run, *mode)

    assert again.returncode == 0, "nothing is left to send"
    assert (wandb_losses(run) if tracker == "wandb" else trackio_losses(tmp_path)) == losses(run)


def test_rows_whose_answers_were_lost_are_once_in_mlflow(plain, tmp_path, mlflow_address):
    """The server stores a request and its answer is lost; the follower sends it again, and is killed at the end."""
    run = copy_of(plain, tmp_path)
    whole = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(whole[:20]))
    with trackers.Proxy(mlflow_address) as proxy:
        words = [("metrics.mlflow.tracking_uri", proxy.address), ("metrics.mlflow.experiment", "lost")]
        with Follower(run, "mlflow", *(word for pair in words for word in ("--override", *pair))):
            wait_for(lambda: position(run, "mlflow") == 20)
            proxy.answers = False
            with (run / "metrics.jsonl").open("a") as file:
                file.write("".join(whole[20:]))
            wait_for(lambda: proxy.lost >= 3)
            assert position(run, "mlflow") == 20
            proxy.answers = True
            wait_for(lambda: position(run, "mlflow") == len(whole))
    assert send_runs([run], [("metrics.mlflow.tracking_uri", mlflow_address), words[1]]) == 0
    _, (in_mlflow,) = mlflow_runs(mlflow_address, "lost")
    final = json.loads((run / "summary.json").read_text())["stages"][1]["forgetting"]["en"]

    assert mlflow_losses(mlflow_address, "lost") == sorted(losses(run))
    assert in_mlflow.data.metrics["final/german/en/forgetting"] == final, "sent although no line was left to send"
    assert in_mlflow.info.status == "FINISHED"


def test_a_run_ends_while_its_server_is_silent_and_track_sends_it_later(tmp_path, mlflow_address):
    """The server accepts connections and never answers. Every step is on the disk before the wait, which is bounded."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    run = tmp_path / "run"
    with trackers.silent_server() as address:
        raw["metrics"] |= {"mlflow": {"tracking_uri": address, "experiment": "late"}, "tracker_timeout_seconds": 1.0}
        outcome = training.train(training.write_config(raw, tmp_path / "c.toml"))

    assert outcome.status == 0, outcome.output
    assert "note: mlflow was not done after 1 s and lacks metrics after line 0" in " ".join(outcome.output.split())
    assert f"titan-cpt track {run}" in " ".join(outcome.output.split())
    assert processes_with(str(run)) == []
    sent = track(run, "--metrics.mlflow.tracking_uri", mlflow_address)
    assert sent.returncode == 0, sent.stderr
    assert mlflow_losses(mlflow_address, "late") == sorted(losses(run))


def test_a_run_whose_server_is_down_says_so_once_and_ends_well(tmp_path):
    """Connections are refused; --quiet does not hide it."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["metrics"]["mlflow"] = {"tracking_uri": f"http://127.0.0.1:{trackers.free_port()}"}
    outcome = training.train(training.write_config(raw, tmp_path / "c.toml"), "--quiet")
    printed = " ".join(outcome.output.split())

    assert outcome.status == 0, outcome.output
    assert printed.count("note: mlflow does not receive the metrics") == 1
    assert "Connection refused" in (tmp_path / "run/trackers/mlflow.log").read_text()
    assert "note: mlflow could not be reached and lacks metrics after line 0" in printed


def test_a_follower_has_its_own_session_and_neither_gpus_nor_the_variables_of_the_job(plain, tmp_path, monkeypatch):
    """A signal to the job's process group does not reach it; a second Ctrl-C during the wait ends the wait."""
    run = copy_of(plain, tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    said = []
    with trackers.silent_server() as address:
        (run / "config.toml").write_text(
            (run / "config.toml").read_text() + f'\n[metrics.mlflow]\ntracking_uri = "{address}"\n'
        )
        config = training.load_config(run / "config.toml")
        stop = StopRequest()
        stop.name = "SIGTERM"  # as if one had arrived: the wait is 5 s at most
        before = time.monotonic()
        with trackers_following(config, run, stop=stop, say=print, warn=said.append, begins=False):
            (pid,) = processes_with(str(run))
            wait_for(lambda: os.getsid(pid) == pid, 5)
            environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
            threading.Timer(0.5, setattr, (stop, "name", "SIGINT")).start()
    assert time.monotonic() - before < 4
    assert "CUDA_VISIBLE_DEVICES=" in environment
    assert not [each for each in environment if each.startswith(("RANK=", "MASTER_ADDR="))]
    assert processes_with(str(run)) == []
    assert len(said) == 1
    assert f"`titan-cpt track {run}` sends them" in said[0]


def test_an_orphan_ends_by_itself(plain, tmp_path):
    """Training was killed and the server is silent: the follower does not outlive its time limit."""
    run = copy_of(plain, tmp_path)
    with trackers.silent_server() as address:
        words = ["--override", "metrics.mlflow.tracking_uri", address, "--timeout", "1"]
        with Follower(run, "mlflow", *words) as follower:
            wait_for(lambda: (run / "trackers/mlflow.lock").exists())
            assert follower.end() == -signal.SIGALRM


def test_a_forked_process_of_the_trainer_does_not_delay_the_end(plain, tmp_path):
    """A data-loader worker inherits the pipe that tells the follower of the end."""
    run = copy_of(plain, tmp_path)
    said = []
    overrides = [("metrics.mlflow.tracking_uri", f"http://127.0.0.1:{trackers.free_port()}")]
    config = load_run(run / "config.toml", overrides)
    following = trackers_following(
        config, run, stop=StopRequest(), say=print, warn=said.append, begins=False, overrides=overrides
    )
    with following:
        sleeper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        sleeper.start()
    sleeper.kill()
    sleeper.join()

    assert said[-1].startswith("note: mlflow could not be reached")


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers every request with 401."""

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_):
        pass


def test_wrong_credentials_are_named_and_never_written(plain, tmp_path, monkeypatch):
    """Neither in the messages nor in any file of the run's folder, clients' logs included."""
    run = copy_of(plain, tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        monkeypatch.setenv("WANDB_BASE_URL", f"http://{host}")
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@{host}")
        answer = track(run, "--metrics.wandb.mode", "online", "--metrics.mlflow.experiment", "x")
        server.shutdown()

    assert answer.returncode == 1
    assert "wandb failed: " in answer.stderr
    assert "mlflow failed: " in answer.stderr
    assert answer.stderr.count("401") >= 2
    assert SECRET not in answer.stdout + answer.stderr
    assert not [path for path in run.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not [*run.glob("trackers/wandb/run-*")], "an attempt leaves no folder"


def test_a_copied_folder_is_another_run(plain, tmp_path):
    """Two folders never write into one run of a tracker."""
    run = copy_of(plain, tmp_path)
    assert track(run, "--metrics.wandb.mode", "offline").returncode == 0
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "trackers/wandb")
    assert track(copy, "--metrics.wandb.mode", "offline").returncode == 0
    (_, first), (_, second) = trackers.wandb_rows(run), trackers.wandb_rows(copy)

    assert first != second
    assert wandb_losses(copy) == wandb_losses(run) == losses(run)


def test_a_missing_client_is_an_error_before_training(tmp_path, monkeypatch):
    """It says how to install it, and that the run can be sent later."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["metrics"]["wandb"] = {}
    monkeypatch.setitem(sys.modules, "wandb", None)

    with pytest.raises(ConfigError, match=r"metrics\.wandb: .* not installed .*titan_cpt\[wandb\].*titan-cpt track"):
        require_clients(training.config_of(raw))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "has no tracker (metrics.wandb, metrics.mlflow, metrics.trackio)"),
        (["--metrics.mlflow.experimnt", "x"], "did you mean 'experiment'"),
        (["elsewhere", "--follow"], "--follow takes one run, got 2"),
    ],
)
def test_mistakes_at_track_are_named(plain, capsys, words, message):
    """With exit status 2."""
    with pytest.raises(SystemExit) as leaving:
        main(["track", str(plain), *words])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


def test_track_wants_a_run_folder(tmp_path, capsys):
    """And says what is missing."""
    with pytest.raises(SystemExit) as leaving:
        main(["track", str(tmp_path)])
    assert leaving.value.code == 2
    assert "is not a run folder" in capsys.readouterr().err
