"""Do libraries learn in time how many threads they may use?"""

from __future__ import annotations

import subprocess
import sys

import pytest

from deployments.runtimes.surroundings import cores

SCRIPT = """
from deployments.runtimes.surroundings import ThreadCap, announce_threads, stay_offline
announce_threads(1)
stay_offline()
cap = ThreadCap(1)
import threading
import torch
from huggingface_hub import constants
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.utils._openmp_helpers import _openmp_effective_n_threads
cap.hold()
seen = []
def look():
    cap.hold()
    seen.append(_openmp_effective_n_threads())
thread = threading.Thread(target=look)
thread.start()
thread.join()
print(torch.get_num_threads(), _openmp_effective_n_threads(), *seen, constants.HF_HUB_OFFLINE)
"""


@pytest.mark.parametrize(("cpu", "count"), [(0, 1), (0.2, 1), (1, 1), (1.5, 2), (4, 4)])
def test_a_share_of_cores_is_rounded_up(cpu: float, count: int) -> None:
    assert cores(cpu) == count


def test_every_thread_is_capped_and_nobody_is_asked() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == ["1", "1", "1", "True"]
