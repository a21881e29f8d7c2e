"""Set before everything else: threads that yield, no network, annotations of `interp` checked while the tests run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported: threads that spin while they wait are 20 times slower beside a busy neighbour.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# No test asks the network for a model; transformers and datasets read this when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import checked
import pytest

if TYPE_CHECKING:
    from interp.models import Subject

checked.install()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices gain nothing from a second thread, and the machine may be shared."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def embedded_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of the session's own with the embedded model in it: converted (25 s) where no other holds it yet."""
    from interp import models

    home = tmp_path_factory.mktemp("workspace")
    root = Path(__file__).parents[1]
    places = [Path(p) for p in (os.environ.get("INTERP_TEST_WORKSPACE"), root / "workspace") if p]
    name = f"{models.EMBEDDED}-{models.EMBEDDED_SHA256[:12]}"
    if held := next((p for p in places if (p / "models" / name / "model.safetensors").is_file()), None):
        (home / "models").mkdir()
        (home / "models" / name).symlink_to((held / "models" / name).resolve())
    models.embedded_folder(home)
    return home


@pytest.fixture(scope="session")
def embedded(embedded_home: Path) -> Subject:
    """The embedded model in float32, for reading only."""
    from interp import models

    return models.load(device="cpu", dtype="float32", workspace_dir=embedded_home)
