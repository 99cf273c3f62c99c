"""Device and dtype follow from what is there."""

import pytest
import torch

from llama.device import default_device, default_dtype, gigabytes, parse_dtype, total_memory


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Pretend what this machine has."""

    def pretend(cuda: int = 0, mps: bool = False, local_rank: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    return pretend


def test_the_device_is_the_best_there_is(machine) -> None:
    machine()
    assert default_device() == torch.device("cpu")
    machine(mps=True)
    assert default_device() == torch.device("mps")
    machine(cuda=4, mps=True, local_rank=3)
    assert default_device() == torch.device("cuda", 3)


def test_more_ranks_than_cuda_devices_are_refused(machine) -> None:
    machine(cuda=2, local_rank=2)
    with pytest.raises(
        ValueError, match=r"rank 2 .* only 2 found; start with --nproc_per_node 2, or pass device='cpu'"
    ):
        default_device()


@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    assert default_dtype(torch.device("cuda")) == (torch.bfloat16 if bf16 else torch.float16)
    assert default_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)


def test_dtypes_by_name() -> None:
    assert parse_dtype("bf16") == parse_dtype("bfloat16") == parse_dtype(torch.bfloat16) == torch.bfloat16
    for wrong in ("int8", torch.int8, None):
        with pytest.raises(ValueError, match="dtype must be"):
            parse_dtype(wrong)  # type: ignore[arg-type]


def test_memory_is_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = total_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert total_memory(torch.device("cpu")) == whole // 4
    assert (gigabytes(2.5e9), gigabytes(12.34e6)) == ("2.50 GB", "12.3 MB")
