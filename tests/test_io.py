"""Hashed files: the checksum does not depend on the order of reading. Errors of the disk as sentences."""

import random
from pathlib import Path

import pytest
import torch

from lr2train import io


@pytest.mark.parametrize("seed", range(8))
def test_a_file_read_in_any_order_has_the_checksum_of_its_bytes(tmp_path, seed):
    draw, path = random.Random(seed), tmp_path / "file"
    path.write_bytes(content := draw.randbytes(draw.choice([0, 1, 70_000, 1_500_000])))
    with io.Hashed(path) as file:
        for _ in range(draw.randrange(20)):
            if draw.random() < 0.5:
                file.seek(draw.randrange(len(content) + 1))
            begin, size = file.tell(), draw.choice([-1, 0, 10, 300_000])
            assert file.read(size) == (content[begin:] if size < 0 else content[begin : begin + size])
        assert file.checksum() == io.checksum(path)


def test_tensors_are_hashed_while_they_are_read(tmp_path):
    tensors = {f"{n}": torch.arange(n, dtype=torch.float32) for n in (3, 1000, 400_000)}
    torch.save(tensors, tmp_path / "file.pt")
    with io.Hashed(tmp_path / "file.pt") as file:
        found = torch.load(file, weights_only=True)
        left_bytes = (tmp_path / "file.pt").stat().st_size - file._hashed_bytes
        assert file.checksum() == io.checksum(tmp_path / "file.pt")
    assert left_bytes < 10_000, "only the directory at the file's end is read a second time"
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_folder_that_cannot_be_made_is_one_sentence_and_a_missing_file_is_its_readers_concern(tmp_path):
    with pytest.raises(FileNotFoundError) as refused:
        Path("/proc/no/folder").mkdir(parents=True)
    assert str(io.for_user(refused.value)).startswith("/proc/no: No such file or directory; set runs_folder")
    with pytest.raises(FileNotFoundError) as missing:
        (tmp_path / "none").read_text()
    assert io.for_user(missing.value) is None
