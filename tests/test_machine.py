"""Free memory of a machine or a container on Linux, the GPU in a record, and float32 products."""

from __future__ import annotations

import pytest
import torch

from memvec import machine

GIB = 2**30
V1, V2 = machine.VERSION_1, machine.VERSION_2


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files of /proc and /sys under a folder that replaces the root."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


def group(folder, names, limit, used, cached):
    """The files of a control group; sizes in GiB."""
    stat = f"anon 1\n{names[2]} {cached * GIB}\nshmem 0\n"
    sizes = [limit if isinstance(limit, str) else f"{limit * GIB}\n", f"{used * GIB}\n", stat]
    return dict(
        zip([f"{folder}/{name}" for name in (*names[:2], "memory.stat")], sizes, strict=True)
    )


def meminfo(gib):
    return {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable:  {gib * 2**20} kB\n"}


@pytest.mark.parametrize(("device", "gpu"), [(None, 0), ("cpu", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_record_names_the_gpu_of_the_model(device, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    where = None if device is None else torch.device(device)
    assert machine.environment(where)["gpu"] == f"GPU {gpu}"


def set_by_the_older_name():
    torch.backends.cuda.matmul.allow_tf32 = True


def set_by_the_newer_name():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.mark.parametrize("chosen", [set_by_the_older_name, set_by_the_newer_name])
def test_products_are_in_full_float32_whatever_a_caller_has_set(chosen):
    products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    torch.set_float32_matmul_precision("highest")
    try:
        chosen()
        before = [kind.fp32_precision for kind in products]
        with machine.plain_torch():
            assert [kind.fp32_precision for kind in products] == ["ieee", "ieee"]
            assert torch.get_float32_matmul_precision() == "highest"
        assert [kind.fp32_precision for kind in products] == before == ["tf32", "ieee"]
    finally:
        torch.set_float32_matmul_precision("highest")


def test_this_machine_has_free_memory():
    assert machine.free_memory() > 2**20


def test_without_meminfo_four_gib_are_assumed(system):
    assert machine.free_memory() == 4 * GIB
    system({"proc/meminfo": "MemTotal: 9 kB\n"})
    assert machine.free_memory() == 4 * GIB


def test_without_control_groups_the_free_memory_is_the_kernels(system):
    system(meminfo(3))
    assert machine.free_memory() == 3 * GIB


@pytest.mark.parametrize(
    ("names", "mounted", "line"),
    [
        (V2, "sys/fs/cgroup", "0::/a/b"),
        (V1, "sys/fs/cgroup/memory", "9:cpu:/z\n4:hugetlb,memory:/a/b"),
    ],
)
@pytest.mark.parametrize("inside", ["", "/a", "/a/b"])
def test_the_smallest_limit_of_the_groups_counts(system, names, mounted, line, inside):
    """Cached files count as free; in a container, the root folder has the files of its group."""
    system(meminfo(50) | {"proc/self/cgroup": line + "\n"})
    unlimited = "max" if names is V2 else str(2**63 - 4096)
    for folder in ("", "/a", "/a/b"):
        system(group(mounted + folder, names, unlimited, 9, 1))
    assert machine.free_memory() == 50 * GIB
    system(group(mounted + inside, names, 8, 7, 2))
    assert machine.free_memory() == 3 * GIB
    system(group(mounted + "/other", names, 1, 1, 0))
    assert machine.free_memory() == 3 * GIB, "this process is not in that group"
    system(group(mounted + inside, names, 8, 9, 0))
    assert machine.free_memory() == 0
