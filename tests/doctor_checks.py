"""Checks that misbehave, for tests of titan_cpt.doctor: they run in processes of their own, as the real ones do."""

import os
import subprocess
import sys
import time

from titan_cpt.doctor.finding import ok
from titan_cpt.errors import DataError


def works(request):
    yield ok("works", f"with {request.config}")


def prints(request):
    print("a library says something")
    os.write(1, b"so does C code\n")
    yield ok("prints", "and is fine")


def raises(request):
    yield ok("raises", "first")
    raise RuntimeError("the disk is gone")


def refuses(request):
    raise DataError("data.idx: damaged")
    yield


def crashes(request):
    yield ok("crashes", "first")
    os.abort()


def hangs(request):
    yield ok("hangs", "first")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(f"child {child.pid}", file=sys.stderr, flush=True)
    time.sleep(600)
