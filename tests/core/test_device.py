"""The device that a name means, on machines with none, one and two GPUs."""

import pytest
import torch

from sensibert.core.device import computes_in_bf16, device_of
from sensibert.core.errors import SensibertError


@pytest.fixture
def gpus(monkeypatch):
    def there(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return there


@pytest.mark.parametrize(
    "count, name, device",
    [(0, "auto", "cpu"), (1, "auto", "cuda"), (2, "cpu", "cpu"), (1, "cuda", "cuda"), (2, "cuda:1", "cuda:1")],
)
def test_a_device_that_is_there(gpus, count, name, device):
    gpus(count)
    assert device_of(name) == torch.device(device)


@pytest.mark.parametrize(
    "count, name, there",
    [(0, "cuda", "auto, cpu"), (1, "cuda:1", "auto, cpu, cuda:0"), (2, "cuda:2", "auto, cpu, cuda:0, cuda:1")],
)
def test_a_device_that_is_not_there(gpus, count, name, there):
    gpus(count)
    with pytest.raises(SensibertError, match=f"^device is '{name}', which is not there, want one of {there}$"):
        device_of(name)


@pytest.mark.parametrize("known", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_processor_computes_in_bf16_if_it_says_so(monkeypatch, known):
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx2": True, known: able}, raising=False)
        assert computes_in_bf16("cpu") is able


def test_a_gpu_computes_in_bf16_unless_it_emulates(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not computes_in_bf16("cuda")
