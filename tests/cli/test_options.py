"""The options that are read from source are those of the parser, and the help of a command is short."""

from dataclasses import fields as fields_of

import lightning as L
import pytest

import lightning_prune as lp
from lightning_prune.__main__ import main
from lightning_prune.classification.datamodules import DigitsData
from lightning_prune.cli.help_page import command_help
from lightning_prune.cli.main import PruneCLI
from lightning_prune.cli.options import data_options, groups_of, method_names, names_of, objective_options
from lightning_prune.cli.trainer import PruneTrainer
from lightning_prune.cli.usage import COMMANDS, OWN_PARSERS
from lightning_prune.reduction.registry import METHODS

RUN = [command for command in COMMANDS if command not in OWN_PARSERS]


def test_the_options_are_those_of_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PruneCLI, "_run_subcommand", lambda self, name: None)
    for command in RUN:
        cli = PruneCLI(
            [command, "--data=DigitsData", "--model.model=vit_digits_patch4_56"],
            model_class=lp.ImageClassifier,
            datamodule_class=L.LightningDataModule,
            subclass_mode_data=True,
            trainer_class=PruneTrainer,
            save_config_callback=None,
            parser_kwargs={"exit_on_error": False},
        )
        config, groups = cli.config[command], groups_of(command)
        for group in ("prune", "model", "trainer"):
            assert names_of(groups[group]) == list(vars(config[group])), group
        known = {"config", "seed_everything", "trainer", "model", "data", "prune", "optimizer", "lr_scheduler"}
        assert set(names_of(groups[""])) == set(vars(config)) - known, command
        assert names_of(data_options("DigitsData")) == list(vars(config.data.init_args))


def test_defaults_and_texts_are_those_of_the_source() -> None:
    options = {option.name: option for option in groups_of("compare")["prune"]}
    assert (options["block"].default, options["method"].default, options["objective"].default) == ("0.25", "auto", "")
    assert options["use_cache"].default == "true"
    assert options["time_limit"].text.startswith("Seconds in total")
    assert all(option.text for command in RUN for group in groups_of(command).values() for option in group)
    for name, fields in objective_options().items():
        assert names_of(fields) == [field.name for field in fields_of(getattr(lp, name)) if field.name[0] != "_"]
        assert all(field.text for field in fields)
    assert names_of(data_options("lightning_prune.DigitsData")) == list(DigitsData().hparams)
    assert data_options("mine.DigitsDataset") == ()


def test_all_methods_are_known() -> None:
    assert {*METHODS, "pomt-nearest", "auto", "dense", "exact", "int8"} <= set(method_names())
    assert all(name in {*METHODS, "pomt-nearest", "auto", "dense", "exact", "int8"} for name in method_names())


@pytest.mark.parametrize("command", RUN)
def test_help_is_short_and_begins_with_pruning(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert printed == command_help(command)
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 120
    assert next(line for line in lines if line.endswith(":") and line[0] != " ") == "pruning:"
    for group, prefix in (("prune", "prune."), ("model", "model."), ("", "")):
        assert all(f"--{prefix}{name} " in printed for name in names_of(groups_of(command)[group]))
    assert all(name in printed for name in names_of(groups_of(command)["trainer"]))
    assert "Linear" not in printed
