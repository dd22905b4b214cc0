"""Code that a model wrote runs with limits, and only what comes to its end has passed."""

import os
import time

import pytest

from moeflow.methods.judge.sandbox import ran

REACHED = """
import errno, socket
try:
    socket.create_connection(("192.0.2.1", 9), 1)
except OSError as error:
    assert error.errno == errno.ENETUNREACH
"""
"""A program that ends well if there is no way to any network."""


def test_only_what_comes_to_its_end_has_passed() -> None:
    assert ran("assert 1 + 1 == 2\nprint('words')", 5).passed
    for program in ("assert False", "import sys; sys.exit(0)", "import os; os._exit(0)", "def", "x = '\0'", "("):
        assert not ran(program, 5).passed, program


def test_its_place_is_an_empty_folder_and_it_has_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    kept = "import os\nassert os.listdir() == [] and not {'HF_TOKEN', 'PATH'} & {*os.environ}\nopen('a', 'w').write('b')"
    before = os.listdir()
    assert ran(kept, 5).passed and ran(kept, 5).passed and os.listdir() == before


@pytest.mark.slow
def test_time_memory_and_files_have_limits() -> None:
    start = time.monotonic()
    for program in (
        "while True: pass",
        "import time; time.sleep(99)",
        "import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\ntime.sleep(99)",
    ):
        assert not ran(program, 0.5).passed, program
    assert time.monotonic() - start < 90, "it was ended, and did not sleep to its end"
    assert not ran("x = bytearray(2 << 30)", 5).passed and not ran("open('a', 'wb').write(bytes(32 << 20))", 5).passed


def test_there_is_no_network_where_the_kernel_lets_us() -> None:
    if not ran("pass", 5).alone:
        pytest.skip("the kernel lets this user make no namespace, and a report says so")
    assert ran(REACHED, 5).passed
