"""Limits of control groups of both versions, in made folders."""

from pathlib import Path

import pytest

from lightning_prune._utils.process_limits import NO_LIMIT, container_limits
from lightning_prune._utils.readings import NotReadable

GROUPS = "sys/fs/cgroup"
V2 = {"proc/self/cgroup": "0::/a/b\n", f"{GROUPS}/cgroup.controllers": "cpu memory\n"}
V1 = {"proc/self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n"}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "quota", "memory", "throttled"),
    [
        (
            {
                **V2,
                f"{GROUPS}/a/b/cpu.max": "max 100000\n",
                f"{GROUPS}/a/b/cpu.stat": "usage_usec 5\nnr_periods 40\nnr_throttled 7\n",
                f"{GROUPS}/a/cpu.max": "150000 100000\n",
                f"{GROUPS}/a/memory.max": f"{3 * 2**30}\n",
                f"{GROUPS}/a/b/memory.max": "max\n",
            },
            1.5,
            3.0,
            {"throttled": 7, "of": 40},
        ),
        ({**V2, f"{GROUPS}/cpu.max": "50000 100000\n"}, 0.5, NO_LIMIT, None),  # the path is that of the host
        (V2, NO_LIMIT, NO_LIMIT, None),
        (
            {
                **V1,
                f"{GROUPS}/cpu/job/cpu.cfs_quota_us": "200000\n",
                f"{GROUPS}/cpu/job/cpu.cfs_period_us": "100000\n",
                f"{GROUPS}/cpu/job/cpu.stat": "nr_periods 5\nnr_throttled 0\n",
                f"{GROUPS}/memory/job/memory.limit_in_bytes": f"{2**29}\n",
            },
            2.0,
            0.5,
            {"throttled": 0, "of": 5},
        ),
        (
            {
                **V1,
                f"{GROUPS}/cpu/cpu.cfs_quota_us": "-1\n",
                f"{GROUPS}/cpu/cpu.cfs_period_us": "100000\n",
                f"{GROUPS}/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            NO_LIMIT,
            NO_LIMIT,
            None,
        ),
    ],
    ids=["nested", "container", "none", "version 1", "version 1, none"],
)
def test_limits(
    files: dict[str, str], quota: float | str, memory: float | str, throttled: dict[str, int] | None, tmp_path: Path
) -> None:
    limits = container_limits(write(tmp_path, files))
    assert (limits["cpu_quota"], limits["memory_limit_gib"]) == (quota, memory)
    assert limits["throttled_periods"] == throttled or isinstance(limits["throttled_periods"], NotReadable)


def test_without_control_groups_it_is_not_said_that_there_is_no_limit(tmp_path: Path) -> None:
    limits = container_limits(tmp_path)
    assert all(isinstance(limits[name], NotReadable) for name in ("cpu_quota", "memory_limit_gib", "throttled_periods"))


def test_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 1, 2, 6}, raising=False)
    assert container_limits(tmp_path)["affinity"] == "1-3,6"
    monkeypatch.delattr("os.sched_getaffinity")
    assert isinstance(container_limits(tmp_path)["affinity"], NotReadable)
