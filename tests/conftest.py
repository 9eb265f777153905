import gc
import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before diffusers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of commands, too: tests run side by side

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from toy_ddpm import TINY_UNET

from dmin.data import Examples
from dmin.data.digits import Digits
from dmin.models.families.ddpm import DDPM

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
torch.set_num_threads(1)  # the models are too small for more to pay


@pytest.fixture(scope="session")
def ddpm() -> DDPM:
    """A real, tiny, class-conditional DDPM; tests must not change it."""
    torch.manual_seed(0)
    return DDPM.build(TINY_UNET, {"beta_schedule": "squaredcos_cap_v2"}).eval()


@pytest.fixture(scope="session")
def ddpm_path(ddpm, tmp_path_factory):
    """The same, saved as diffusers saves it."""
    path = tmp_path_factory.mktemp("models") / "ddpm"
    ddpm.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def digits() -> Examples:
    """Twenty-six real digits: three blocks of eight and a short one."""
    return Examples(Digits("train").examples[:26])


def pytest_collection_finish():
    """Spare the garbage collector what was imported: a search of it all takes half a second."""
    gc.collect()
    gc.freeze()
