"""TrimConfig: made only of values that can be, the same from JSON, and readable from what earlier versions wrote."""

import dataclasses

import pytest

from sensibert.core.config import (
    ALLOCATIONS,
    BASELINE,
    METHODS,
    RETIRED,
    TrimConfig,
    grid_name,
    parse_grid,
    parse_shape,
    trim_names,
)
from sensibert.core.errors import SensibertError
from sensibert.core.grid import Grid
from sensibert.core.schedule import Schedule
from sensibert.core.settings import settings_of
from sensibert.core.statistics import STATISTICS

CONFIGS = [
    TrimConfig(),
    TrimConfig("30%flops", scope="model", flops_length=64, allocation="uniform", width_multiple=8, compensate=False),
    TrimConfig(grid="block64", method="saliency", schedule=Schedule("cubic", milestones=3, recovery="continue")),
    TrimConfig(method=BASELINE, schedule=Schedule(freeze_embeddings=True, recover_dropout=0.1, recover_peak=2)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.budget)
def test_json_and_settings_give_the_same_config_back(config):
    assert TrimConfig.from_json(config.to_json()) == config
    assert TrimConfig.from_settings(config.settings()) == config
    assert config.settings().keys() == trim_names()


DEFAULTS = {
    "budget": "50%params",
    "method": None,
    "grid": "unit",
    "scope": "encoder",
    "allocation": "global",
    "width_multiple": None,
    "flops_length": 128,
    "samples": 1024,
    "micro_batch": 4,
    "compensate": None,
    "runtime": "torch",
    "latency_shape": "1x128",
    "latency_threads": 1,
    "latency_table": None,
    "weights": None,
    "schedule": "oneshot",
    "trim_start": None,
    "trim_duration": 0.2,
    "milestones": 6,
    "warmup_ratio": 0.06,
    "rewarm_ratio": 0.03,
    "recovery": None,
    "recover_peak": None,
    "recover_dropout": None,
    "freeze_embeddings": None,
}


def test_defaults_change_only_on_purpose():
    """Runs that name no setting, and files of earlier versions that lack one, depend on them."""
    assert TrimConfig().settings() == DEFAULTS
    assert (Schedule().start(), Schedule().dropout(), Schedule().peak(0.5, 0.1)) == (1 / 3, 0.0, 1.6)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrimConfig().budget = "30%params"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"budget": "half"}, "budget: 'half' is not a budget, want for example 50%params"),
        ({"budget": 0.5}, "budget is 0.5, want text"),
        ({"method": "best"}, "method is 'best', want one of obs, layer-obs"),
        ({"scope": "head"}, "scope is 'head', want one of encoder, model"),
        ({"grid": "rows"}, "grid is 'rows', want one of unit, element, block64"),
        ({"allocation": "fair"}, "allocation is 'fair', want one of global, uniform, exact"),
        ({"width_multiple": 0}, "width_multiple is 0, want more than 0"),
        ({"samples": True}, "samples is True, want a whole number"),
        ({"micro_batch": 2.5}, "micro_batch is 2.5, want a whole number"),
        ({"flops_length": -1}, "flops_length is -1, want more than 0"),
        ({"compensate": "yes"}, "compensate is 'yes', want true or false"),
        ({"schedule": "cubic"}, "schedule is 'cubic', want a Schedule"),
        ({"grid": "element", "budget": "30%flops"}, "no kernel skips single elements"),
        ({"grid": "element", "method": "obs"}, "method is 'obs', which needs whole units, and grid is 'element'"),
        ({"grid": "block8", "allocation": "exact"}, "allocation is 'exact', which needs whole units"),
        ({"grid": "block8", "width_multiple": 8}, "width_multiple is 8, which needs whole units"),
        ({"grid": "block8", "compensate": True}, "compensate is True, which needs whole units"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_named_when_the_config_is_made(settings, message):
    with pytest.raises(SensibertError, match=message):
        TrimConfig(**settings)


def test_former_names_and_spellings_are_read():
    written = {"policy": "uniform", "step": 8, "warm_share": 0.5, "trim_share": 0.1, "warmup": 0.2, "rewarm": 0.1}
    config = TrimConfig.from_settings({**written, "method": "paper", "recovery": "lifted", **RETIRED})
    assert (config.allocation, config.width_multiple, config.method) == ("uniform", 8, "soft_gates")
    schedule = Schedule(trim_start=0.5, trim_duration=0.1, warmup_ratio=0.2, rewarm_ratio=0.1, recovery="rewarm")
    assert config.schedule == schedule
    assert Schedule(recovery="plain").recovery == "continue" and TrimConfig(method="dense").method == BASELINE


@pytest.mark.parametrize("name, value", [("search", 4), ("distil_until", 0.5), ("distil_hidden", 1.0)])
def test_a_retired_setting_that_changed_something_is_refused(name, value):
    with pytest.raises(SensibertError, match=f"{name} is {value}, but this setting was removed"):
        TrimConfig.from_settings({name: value})


def test_json_that_is_no_config_is_refused_in_words():
    for text, message in (
        ("{", "the text is not JSON"),
        ("[" * 50_000, "the text is not JSON .it is nested too deeply"),
        ('{"budget": "50%params", "budget": "10%params"}', "the text is not JSON .'budget' is given twice"),
        ("[]", "the JSON holds a list, want an object of settings"),
        (
            '{"budgt": "50%params"}',
            "budgt is no setting of a trim, want one of allocation, budget.*; did you mean 'budget'",
        ),
        (
            '{"policy": "global", "allocation": "global"}',
            r"allocation is given twice, as policy \(its former name\) too",
        ),
        (
            '{"allocation": "global", "policy": "global"}',
            r"allocation is given twice, as policy \(its former name\) too",
        ),
    ):
        with pytest.raises(SensibertError, match=message):
            TrimConfig.from_json(text)


def test_what_is_none_follows_from_the_rest():
    unit, blocks = TrimConfig().resolved(), TrimConfig(grid="element").resolved()
    assert (unit.method, unit.compensate) == ("obs", True) and unit.parsed_grid() is None
    assert (blocks.method, blocks.compensate, blocks.parsed_grid()) == ("fisher", False, Grid.element())
    assert TrimConfig(method="fisher").resolved().compensate is False
    assert TrimConfig(method="fisher", compensate=True).resolved().compensate is True
    assert not TrimConfig(method=BASELINE).trims and TrimConfig().trims


def test_every_setting_says_what_it_is_and_every_list_of_choices_is_written_once():
    for kind in (TrimConfig, Schedule):
        for name, field in settings_of(kind).items():
            assert field.metadata["help"].endswith("."), name
    choices = settings_of(TrimConfig)
    assert METHODS == (*STATISTICS, BASELINE) == choices["method"].metadata["choices"]
    assert choices["allocation"].metadata["choices"] is ALLOCATIONS


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TrimConfig(samples=10**25), "samples is 10000000000000000000000000, want at most 63 bits"),
        (lambda: TrimConfig(samples=10**6000), "samples is a number of 19932 bits, want at most 63 bits"),
        (lambda: Schedule("cubic", milestones=10**12), "milestones is 1000000000000, want 1 to 10000"),
    ],
)
def test_a_number_that_nothing_could_count_to_is_refused(make, message):
    with pytest.raises(SensibertError, match=message):
        make()


def test_a_grid_is_named_as_it_is_read():
    for name in ("unit", "element", "block64", "block3"):
        assert grid_name(parse_grid(name)) == name
    assert grid_name(Grid.row()) == "row" and grid_name(Grid.block(2, 3)) == str(Grid.block(2, 3))


@pytest.mark.parametrize("text", ["1x0", "0x1", "1", "x", "1x1000000", "1 x 2", "", None, 3])
def test_a_shape_that_is_none_is_named(text):
    assert parse_shape("1x128") == (1, 128) and parse_shape("999999x1") == (999_999, 1)
    with pytest.raises(SensibertError, match="^latency_shape is .*, want rows x tokens, for example 1x128$"):
        parse_shape(text)


def test_a_table_of_latencies_needs_a_budget_of_latency():
    with pytest.raises(SensibertError, match="latency_table is given, and budget is 5MB: want a budget of ms, or no"):
        TrimConfig(budget="5MB", latency_table="not-read.json")
    assert TrimConfig(latency_table="not-read.json").parsed_budget().table is None
