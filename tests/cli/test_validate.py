from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from omegaconf import OmegaConf

from dmin.cli.config import validate as module
from dmin.cli.config.annotations import fits, spell
from dmin.cli.config.sections import settings
from dmin.cli.config.validate import validate
from dmin.runtime.errors import DminError


class Toy:
    def __init__(
        self,
        width: int,
        rate: float = 0.1,
        kind: Literal["a", "b"] = "a",
        path: str | Path | None = None,
        sizes: Sequence[int] = (),
        part: Toy | None = None,
        absent: NotImportedHere | None = None,  # noqa: F821
    ) -> None: ...

    @classmethod
    def load(cls, path: Path, *, strict: bool = True) -> Toy:
        raise AssertionError("validation calls nothing")


class Open:
    def __init__(self, width: int = 1, **others: Any) -> None: ...


def function(scale: float) -> None: ...


NOT_CALLABLE = 3


def toy(name: str = "Toy", **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"{__name__}.{name}", **arguments}


def check(needed: Iterable[str] = (), **sections: Any) -> None:
    validate(OmegaConf.create(sections), needed)


def refused(message: str, needed: Iterable[str] = (), **sections: Any) -> None:
    with pytest.raises(DminError, match=message) as caught:
        check(needed, **sections)
    assert "\n" not in str(caught.value), "one paragraph"


def test_what_is_right_passes() -> None:
    check(
        seed=1,
        tags=["x"],
        model=toy(width=3, rate=1, kind="b", path="x", sizes=[1, 2], part=toy(width=1)),
        data=toy("Toy.load", path="x", strict=False),
        sketch=toy("Open", width=1, anything="x", more=[1]),
        noise=toy("function", scale=0.5),
        benchmark={"store": "${data.path}/store", "free": {"form": 1}},
        trainer=None,
    )


class TestRoot:
    def test_unknown_key_is_refused_with_the_nearest(self) -> None:
        refused(
            r"^skech is not a setting of dmin\. Did you mean sketch\? Allowed: model,", skech={}
        )

    def test_key_like_no_other_is_refused_with_all_allowed(self) -> None:
        refused(re.escape(f"Allowed: {', '.join(each.name for each in settings())}."), xyzzy=1)

    @pytest.mark.parametrize(
        ("section", "value", "takes"),
        [("seed", "one", "int"), ("seed", True, "int"), ("tags", "x", "a list of str or null")],
    )
    def test_value_of_the_wrong_type_is_refused(self, section: str, value: Any, takes: str) -> None:
        refused(rf"^{section} is {value!r} .* but dmin takes {takes}\.", **{section: value})

    def test_scalar_for_a_section_is_refused(self) -> None:
        refused(r"^model is 'ddpm' \(str\), but dmin takes a mapping or null", model="ddpm")


def test_a_section_is_held_to_its_settings() -> None:
    check(
        collect={"block_size": 3, "microbatch": "auto", "memory": 5}, retrieve={"where": {"a": 1}}
    )
    refused(
        r"collect\.blocksize is not a setting of collect\. Did you mean block_size",
        collect={"blocksize": 3},
    )
    refused(r"collect\.block_size is 'x' .* but collect takes int", collect={"block_size": "x"})
    refused(r"retrieve\.k is 2\.5 .* but retrieve takes int", retrieve={"k": 2.5})
    refused(r"^collect is 3 \(int\), but dmin takes a mapping or null", collect=3)


def test_every_setting_of_a_section_has_a_type_that_its_default_fits() -> None:
    for section in ("", *(each.name for each in settings() if settings(each.name))):
        for each in settings(section):
            assert each.annotation is not type(None), f"{section}.{each.name}"
            assert each.default is None or fits(each.default, each.annotation)


class TestArguments:
    def test_unknown_is_refused_with_the_nearest_and_all(self) -> None:
        refused(
            r"^model\.widht is not a setting of .*Toy\. Did you mean width\? Allowed: width, rate",
            model=toy(widht=3),
        )

    def test_unknown_of_a_class_method(self) -> None:
        refused(r"data\.strickt .* Did you mean strict\?", data=toy("Toy.load", path="", strickt=1))

    def test_unknown_of_a_function(self) -> None:
        refused(r"noise\.scal .* Did you mean scale\?", noise=toy("function", scal=1.0))

    def test_named_argument_of_an_open_target_is_still_checked(self) -> None:
        refused(r"sketch\.width is 'x'", sketch=toy("Open", width="x"))

    def test_misspelt_key_of_instantiate(self) -> None:
        refused(r"model\._partail_ .* Did you mean _partial_\?", model=toy(width=1, _partail_=True))
        refused(r"sketch\._partail_", sketch=toy("Open", _partail_=True))

    def test_in_a_nested_call_a_list_and_a_plain_section(self) -> None:
        refused(r"^model\.part\.widht ", model=toy(width=1, part=toy(widht=1)))
        refused(r"^train\.many\.1\.widht ", train={"many": [toy(width=1), toy(widht=1)]})
        refused(r"^train\.stop\.widht ", train={"stop": toy(widht=1)})

    def test_missing_is_named_with_the_override_that_sets_it(self) -> None:
        refused(r"^No value for model\.width\. Set \+model\.width=<value>\.", model=toy())

    def test_all_that_is_missing_is_named_at_once(self) -> None:
        refused(
            r"No value for model\.width, benchmark\.store\. "
            r"Set model\.width=<value> benchmark\.store=",
            model=toy(width="???"),
            benchmark={"store": "???"},
        )

    def test_missing_is_fine_for_a_partial(self) -> None:
        check(model=toy(_partial_=True))

    def test_positional_arguments_count(self) -> None:
        check(model=toy(_args_=[3]))

    def test_interpolation_to_what_is_missing(self) -> None:
        refused(
            r"No value for model\.width, data\.x\.",
            model=toy(width="${data.x}"),
            data={"x": "???"},
        )

    def test_interpolation_is_checked_by_its_value(self) -> None:
        check(model=toy(width="${seed}"), seed=3)
        refused(r"model\.width is 'x'", model=toy(width="${name}"), name="x")

    def test_interpolation_to_nowhere(self) -> None:
        refused(r"^model\.width cannot be resolved: .*'nowhere'", model=toy(width="${nowhere}"))
        refused(r"^model\._target_ cannot be resolved", model={"_target_": "${nowhere}"})
        refused(r"SLURM sets it.*say model\.width=", model=toy(width="${oc.env:SLURM_NOTHING}"))

    def test_wrong_type_names_key_value_and_what_is_allowed(self) -> None:
        refused(r"^model\.width is 'x' \(str\), but .*\.Toy takes int\.", model=toy(width="x"))
        refused(r"takes one of 'a', 'b'\.", model=toy(width=1, kind="c"))
        refused(r"model\.sizes is \[1, 'x'\] .* a list of int", model=toy(width=1, sizes=[1, "x"]))
        refused(r"data\.strict is 1 \(int\)", data=toy("Toy.load", path="x", strict=1))

    def test_annotation_that_cannot_be_evaluated_allows_anything(self) -> None:
        check(model=toy(width=1, absent=3))


class TestTargets:
    @pytest.mark.parametrize(
        ("target", "said"),
        [
            (f"{__name__}.Tyo", r"has no Tyo\. Did you mean Toy\b"),
            (f"{__name__}.Toy.laod", r"Toy has no laod\. Did you mean load\?"),
            ("dmin.runtime.eror.DminError", r"dmin.runtime has no eror\. Did you mean errors\?"),
            ("no_such_package.Model", "there is no module no_such_package.*run dmin in its folder"),
            (f"{__name__}.NOT_CALLABLE", "not a class or a function"),
            (3, "3, not the dotted name"),
        ],
    )
    def test_that_is_not_there(self, target: Any, said: str) -> None:
        refused(rf"^model\._target_ is .*{said}", model={"_target_": target})

    @pytest.mark.parametrize(
        ("source", "said"),
        [
            ("import faiss_of_nobody", r"needs faiss_of_nobody.* pip install faiss_of_nobody"),
            ("import sklearn.of_nobody", r"needs sklearn.of_nobody.* pip install scikit-learn"),
            ("raise ValueError('no')", "ValueError: no.*HYDRA_FULL_ERROR=1"),
            ("import broken_toy.part", "ModuleNotFoundError"),
        ],
    )
    def test_whose_import_fails(
        self, source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "broken_toy.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "broken_toy", raising=False)
        refused(
            rf"^model\._target_ is broken_toy\.Model, which cannot be imported: .*{said}",
            model={"_target_": "broken_toy.Model"},
        )


class TestNeeded:
    def test_section_that_is_not_there(self) -> None:
        refused(r"No value for tags\. Set \+tags=<value>\.", needed=("tags",))
        check(needed=("tags",), tags=None)

    def test_group_that_is_not_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "groups", lambda: {"model": ["ddpm", "dit"]})
        refused(r"Set model=<choice>\. Choices of model: ddpm, dit\.", needed=("model",))


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        (int, [0, -3], [True, 1.0, "1", None, []]),
        (float, [1, 1.5], [True, "1e-3", None]),
        (bool, [True, False], [0, 1, "true", None]),
        (str, ["", "x"], [1, None, True, ["x"]]),
        (Path, ["x", Path("x")], [1, None]),
        (None, [None], [0, ""]),
        (int | None, [1, None], ["x", False]),
        (Literal["a", 1], ["a", 1], ["b", True, 1.0]),
        (list[int], [[], [1, 2]], [[1, "x"], 1, None, {"a": 1}]),
        (list, [[1, "x"]], ["x", 3]),
        (Sequence[str], [["a"]], ["a", [1]]),
        (tuple[int, ...], [[], [1, 2, 3]], [[1, "x"], 1]),
        (tuple[int, str], [[1, "x"]], [[1], ["x", 1], [1, "x", 2]]),
        (dict[str, int], [{"a": 1}, {}], [1, [1]]),
        (Annotated[int, "positive"], [1], ["x"]),
        (list[Literal["a", "b"] | None], [["a", None]], [["c"]]),
        (Toy, [1, "x", None], []),
        (Toy | int, ["x"], []),
        (Any, [1, "x", None], []),
        (int, ["???", {"_target_": "x"}], [{"a": 1}]),
    ],
)
def test_fits(annotation: Any, right: list[Any], wrong: list[Any]) -> None:
    assert all(fits(value, annotation) for value in right)
    assert not any(fits(value, annotation) for value in wrong)


@pytest.mark.parametrize(
    ("annotation", "spelled"),
    [
        (int | None, "int or null"),
        (Literal["a", 2], "one of 'a', 2"),
        (Sequence[float], "a list of float"),
        (tuple[int, ...], "a list of int"),
        (tuple[int, str], "a list of 2: int, str"),
        (str | Path, "str or path"),
        (dict[str, int], "a mapping"),
        (list, "a list"),
    ],
)
def test_spell(annotation: Any, spelled: str) -> None:
    assert spell(annotation) == spelled
