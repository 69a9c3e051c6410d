"""`hooked-vla serve`, from the command line to a client and back, and what it says of mistakes."""

import os
import re
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hooked_vla.cli import app
from hooked_vla.serving import needs_harness_extra, needs_serve_extra
from hooked_vla.serving.cli import read_camera_map
from hooked_vla.serving.server import RunningServer

RUNNER = CliRunner(env={"COLUMNS": "400", "TERM": "dumb"})


def test_a_served_policy_answers_until_interrupted():
    from test_openpi import OBS, PlainClient

    # whoever runs the tests in the background may ignore interrupts, and children would inherit that
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    start += "from hooked_vla.cli import app; app()"
    command = [sys.executable, "-c", start, "serve", "--model", "smolvla", "--size", "tiny", "--port", "0", "--cameras",
               "base=agent"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"smolvla speaks openpi at ws://127.0.0.1:(\d+)", process.stdout.readline())
            assert found
            client = PlainClient(RunningServer("127.0.0.1", int(found[1])))
            base = OBS["observation/agent"]
            sent = {key: value for key, value in OBS.items() if key != "observation/agent"} | {"observation/base": base}
            assert client.infer(sent)["actions"].shape == (8, 4)
            client.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "smolvla"], "names a model without weights"),
        (["--model", "no/such/folder", "--size", "tiny"], "unknown model"),
        (["--model", "smolvla", "--size", "tiny", "--protocol", "grpc"], "unknown protocol 'grpc'"),
        (["--model", "smolvla", "--size", "tiny", "--cameras", "base"], "cameras are CLIENT=POLICY"),
        (["--model", "smolvla", "--size", "tiny", "--cameras", "base=top"], "no cameras ['top']"),
        (["--model", "smolvla", "--size", "tiny", "--host", "203.0.113.1"], "cannot listen on 203.0.113.1:8000"),
        (["--model", "smolvla", "--size", "tiny", "--device", "moon"], "device 'moon' is unknown"),
    ],
)
def test_mistakes_are_said_without_a_traceback(arguments, message):
    result = RUNNER.invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert message in re.sub(r"[\s│]+", " ", result.output)


def test_camera_maps():
    assert read_camera_map(None) == {}
    assert read_camera_map("observation/image=agent,b=wrist") == {"observation/image": "agent", "b": "wrist"}
    for wrong in ("agent", "=agent", "image=", "a=b,", ""):
        with pytest.raises(ValueError, match="CLIENT=POLICY"):
            read_camera_map(wrong)


def test_missing_packages_name_the_extra(monkeypatch):
    for package, extra, needs in (
        ("websockets", "serve", needs_serve_extra),
        ("msgpack", "serve", needs_serve_extra),
        ("vla_eval", "vla-eval", needs_harness_extra),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        message = rf"{package} is not installed; .*hooked-vla\[{extra}\]"
        with pytest.raises(ModuleNotFoundError, match=message), needs():
            __import__(package)
