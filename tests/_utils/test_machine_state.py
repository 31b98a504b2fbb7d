"""Readers of the system, on made folders in the place of /proc and /sys."""

from pathlib import Path

import pytest

from lightning_prune._utils import machine_state as module
from lightning_prune._utils.hardware_facts import instruction_sets, memory_facts, processor_facts
from lightning_prune._utils.machine_state import read_state
from lightning_prune._utils.readings import NotReadable, attempt, number_of, printed_by, text_of
from lightning_prune._utils.system_load import CpuTimes, cpu_times, read_load

CPUS = "sys/devices/system/cpu"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_state_of_a_machine_that_tells_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "printed_by", lambda words: NotReadable("not installed"))
    files = {
        f"{CPUS}/intel_pstate/no_turbo": "1\n",
        "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp\n",
        "sys/class/thermal/thermal_zone0/temp": "61500\n",
        "sys/class/hwmon/hwmon3/name": "nvme\n",
        "sys/class/hwmon/hwmon3/temp1_input": "40850\n",
        "sys/firmware/acpi/platform_profile": "low-power\n",
        "sys/class/power_supply/BAT0/type": "Battery\n",
        "sys/class/power_supply/BAT0/status": "Discharging\n",
        "sys/class/power_supply/AC/online": "0\n",
    }
    for cpu, governor, mhz, throttled in (
        (0, "powersave", 800, 3),
        (1, "powersave", 2400, 4),
        (10, "performance", 3, 0),
    ):
        files |= {
            f"{CPUS}/cpu{cpu}/cpufreq/scaling_governor": f"{governor}\n",
            f"{CPUS}/cpu{cpu}/cpufreq/scaling_driver": "intel_pstate\n",
            f"{CPUS}/cpu{cpu}/cpufreq/scaling_cur_freq": f"{mhz}000\n",
            f"{CPUS}/cpu{cpu}/cpufreq/scaling_max_freq": "3900000\n",
            f"{CPUS}/cpu{cpu}/thermal_throttle/core_throttle_count": f"{throttled}\n",
            f"{CPUS}/cpu{cpu}/thermal_throttle/package_throttle_count": "9\n",
        }
    state = read_state(write(tmp_path, files))
    assert state["governor"] == {"powersave": 2, "performance": 1}
    assert state["frequency_driver"] == "intel_pstate"
    assert state["frequency_mhz"] == {"least": 3, "median": 800, "most": 2400, "by": "scaling_cur_freq"}
    assert state["cores_by_frequency_limit"] == {"3900 MHz": 3}
    assert state["turbo"] == "off"
    assert state["throttled_so_far"] == {"core": 7, "package": 9}
    assert state["temperatures_celsius"] == {"x86_pkg_temp": 61.5, "nvme": 40.85}
    assert (state["power_mode"], state["power_source"]) == ("low-power", "battery")
    assert isinstance(state["energy_preference"], NotReadable)


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ({"BAT0": ("Battery", "0", "Discharging", "System"), "mouse": ("Mains", "1", "", "Device")}, "battery"),
        ({"BAT0": ("Battery", "1", "Discharging", "System")}, "battery"),
        ({"BAT0": ("Battery", "1", "Charging", "System"), "AC": ("Mains", "1", "", "System")}, "mains"),
        ({"usb": ("USB", "2", "", "")}, "mains"),
        ({"mouse": ("Battery", "1", "Discharging", "Device")}, None),
    ],
)
def test_only_supplies_of_the_machine_count(
    supplies: dict[str, tuple[str, str, str, str]],
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "printed_by", lambda words: NotReadable("no"))
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    for name, values in supplies.items():
        folder = f"sys/class/power_supply/{name}"
        fields = zip(("type", "online", "status", "scope"), values, strict=True)
        write(tmp_path, {f"{folder}/{field}": f"{value}\n" for field, value in fields if value})
    source = read_state(tmp_path)["power_source"]
    assert isinstance(source, NotReadable) if expected is None else source == expected


def test_of_sensors_of_one_name_the_hottest_counts(tmp_path: Path) -> None:
    files = {}
    for number, (kind, heat) in enumerate((("acpitz", 27), ("acpitz", 61), ("acpitz", 30), ("x86_pkg_temp", 50))):
        files |= {f"sys/class/thermal/thermal_zone{number}/type": kind}
        files |= {f"sys/class/thermal/thermal_zone{number}/temp": f"{heat}000"}
    for number, (kind, heat) in enumerate((("nvme", 45), ("nvme", 38), ("acpitz", 40))):
        files |= {
            f"sys/class/hwmon/hwmon{number}/name": kind,
            f"sys/class/hwmon/hwmon{number}/temp1_input": f"{heat}000",
        }
    found = read_state(write(tmp_path, files))["temperatures_celsius"]
    assert found == {"acpitz": 61.0, "x86_pkg_temp": 50.0, "nvme": 45.0}


def test_what_is_missing_is_named_and_never_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "printed_by", lambda words: NotReadable(f"{words[0]} is not installed"))
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    state = read_state(tmp_path)
    assert all(isinstance(value, NotReadable) for value in state.values())
    assert "scaling_governor" in state["governor"].reason
    assert "nvpmodel" in state["power_mode"].reason


@pytest.mark.parametrize(
    ("system", "said", "expected"),
    [
        ("Linux", {"nvpmodel": "NV Power Mode: MAXN\n0"}, "NV Power Mode: MAXN 0"),
        ("Darwin", {"pmset": " standby 1\n lowpowermode         1\n"}, "lowpowermode 1"),
    ],
)
def test_power_mode_of_other_machines(
    system: str, said: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.platform, "system", lambda: system)
    monkeypatch.setattr(module, "printed_by", lambda words: said.get(words[0], NotReadable("no")))
    assert read_state(tmp_path)["power_mode"] == expected


def test_the_frequency_of_cpuinfo_is_named_as_such(tmp_path: Path) -> None:
    write(tmp_path, {"proc/cpuinfo": "cpu MHz\t\t: 2445.4\n\ncpu MHz\t\t: 2600.0\n"})
    assert read_state(tmp_path)["frequency_mhz"] == {
        "least": 2445,
        "median": 2523,
        "most": 2600,
        "by": "/proc/cpuinfo",
    }


def test_processor_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    files = {
        "proc/cpuinfo": "flags\t\t: fpu sse2 avx2 avx512_vnni amx_int8 hypervisor fma\n",
        "proc/meminfo": "MemTotal:       16777216 kB\nMemAvailable:    4194304 kB\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "sys/devices/system/node/node0/x": "",
    }
    for cpu, core, mhz in ((0, 0, 3000), (1, 0, 3000), (2, 1, 1800)):
        files |= {
            f"{CPUS}/cpu{cpu}/topology/physical_package_id": "0\n",
            f"{CPUS}/cpu{cpu}/topology/core_id": f"{core}\n",
            f"{CPUS}/cpu{cpu}/cpufreq/cpuinfo_max_freq": f"{mhz}000\n",
        }
    facts = processor_facts(write(tmp_path, files))
    assert (facts["sockets"], facts["physical_cores"], facts["numa_nodes"]) == (1, 2, 1)
    assert facts["cores_by_frequency"] == {"3000 MHz": 2, "1800 MHz": 1}
    assert facts["instruction_sets"] == ["fma", "avx2", "avx512_vnni", "amx_int8"]
    assert facts["virtual_machine"] is True
    memory = memory_facts(tmp_path)
    assert (memory["total_gib"], memory["available_gib"]) == (16.0, 4.0)
    assert memory["transparent_huge_pages"] == "madvise"
    assert isinstance(memory["swap_gib"], NotReadable)


def test_instruction_sets_of_other_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert isinstance(instruction_sets(tmp_path), NotReadable)
    write(tmp_path, {"proc/cpuinfo": "Features\t: fp asimd asimddp i8mm sve\n"})
    assert instruction_sets(tmp_path) == ["asimd", "asimddp", "i8mm", "sve"]
    assert isinstance(processor_facts(tmp_path)["virtual_machine"], NotReadable)


def test_load(tmp_path: Path) -> None:
    files = {
        "proc/loadavg": "1.50 0.75 0.10 3/245 999\n",
        "proc/pressure/cpu": "some avg10=12.34 avg60=0.00 avg300=0.00 total=1\n",
        "proc/stat": "cpu  100 0 50 700 50 0 10 90 0 0\ncpu0 1\n",
    }
    load = read_load(write(tmp_path, files))
    assert load == {
        "load_average": [1.5, 0.75, 0.1],
        "tasks": {"running": 3, "of": 245},
        "cpu_pressure_percent": 12.34,
    }
    assert cpu_times(tmp_path) == CpuTimes(total=1000, idle=750, stolen=90)
    write(tmp_path, {"proc/stat": "cpu 1 2\n"})
    assert isinstance(cpu_times(tmp_path), NotReadable)


def test_readings_say_why_there_is_none(tmp_path: Path) -> None:
    assert text_of(tmp_path / "none") == NotReadable(f"no {tmp_path / 'none'}")
    (tmp_path / "word").write_text("abc")
    assert "'abc'" in str(number_of(tmp_path / "word"))
    assert str(tmp_path) in str(text_of(tmp_path))  # a folder
    assert printed_by(["no-such-program-here"]) == NotReadable("no-such-program-here is not installed")
    assert "KeyError" in str(attempt(lambda: {}["x"]))
