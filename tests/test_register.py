"""What `import sensibert` does and leaves undone: it is light, transformers learns its classes, every name is there."""

import pytest

import sensibert
from sensibert.models import modeling_sensibert
from tests import fresh

FIRST = """
import sys
import sensibert
light = not {"torch", "transformers", "numpy"} & set(sys.modules)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
print(light, CONFIG_MAPPING["sensibert_bert"].__module__, type(sys.meta_path[0]).__name__)
"""


def test_importing_sensibert_is_light_and_transformers_learns_of_it_when_its_auto_classes_come(tmp_path):
    light, module, first_finder = fresh.run(FIRST, cwd=tmp_path, interpreter=True).split()
    assert (light, module) == ("True", "sensibert.models.modeling_sensibert")
    assert first_finder != "_WhenImported", "the import hook serves once"


def test_every_public_name_is_found_where_it_is_said_to_be():
    assert set(sensibert.__all__) <= set(dir(sensibert))
    for name in sensibert.__all__:
        assert getattr(sensibert, name) is not None, name
    for module, name in ((sensibert, "prune"), (modeling_sensibert, "SensibertNothing")):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(module, name)
