import pytest

from clipft.core.memory import cgroup_free


@pytest.mark.parametrize(("version", "left"), [(2, [700, 250]), (1, [700, 250])])
def test_each_limit_of_the_cgroup_and_its_parents_counts(tmp_path, version, left):
    limit, used, stat, top = (
        ("memory.max", "memory.current", "inactive_file", tmp_path)
        if version == 2
        else (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
            tmp_path / "memory",
        )
    )
    unlimited = "max" if version == 2 else str(2**63 - 4096)
    for folder, most, held in (
        (top, unlimited, 9000),
        (top / "job", "1000", 400),
        (top / "job" / "step", "500", 350),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text(f"{held}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{stat} 100\n")
    mine = tmp_path / "cgroup"
    mine.write_text("0::/job/step\n" if version == 2 else "4:memory:/job/step\n3:cpu:/\n")
    assert sorted(cgroup_free(tmp_path, mine)) == sorted(left)
    assert cgroup_free(tmp_path, tmp_path / "none") == []
