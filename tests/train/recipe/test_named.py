"""What a recipe names as "package.module:Name" is imported, and what is wrong with it is said."""

import re
import sys
from collections import OrderedDict

import pytest

from ngrpo_train.recipe.named import import_named


def test_it_is_imported():
    assert import_named("section.field", "collections:OrderedDict") is OrderedDict
    assert import_named("section.field", "os.path:join")("a", "b") == "a/b"


def test_a_module_beside_the_user_is_found_behind_all_that_is_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", str(tmp_path))])
    (tmp_path / "my_own_scoring.py").write_text("def score():\n    return 'mine'\n")
    (tmp_path / "collections.py").write_text("OrderedDict = None\n")
    assert import_named("section.field", "my_own_scoring:score")() == "mine"
    assert import_named("section.field", "collections:OrderedDict") is OrderedDict


@pytest.mark.parametrize(
    "value, reason",
    [
        ("collections", " must be package.module:Name"),
        ("collections:", " must be package.module:Name"),
        (":OrderedDict", " must be package.module:Name"),
        ("nowhere:Name", ": No module named 'nowhere': install it, or add its directory to PYTHONPATH"),
        ("nowhere.at_all:Name", ": No module named 'nowhere': install it, or add its directory to PYTHONPATH"),
        ("collections:Missing", ": module 'collections' has no attribute 'Missing'"),
        ("math:pi", " is not callable"),
    ],
)
def test_what_is_not_there_is_named_by_field_and_value(value, reason):
    with pytest.raises(ValueError, match=f"^{re.escape(f'section.field = {value!r}{reason}')}$"):
        import_named("section.field", value)


@pytest.mark.parametrize(
    "program, reason",
    [
        ("import math\n\nfactor = undefined\n", "NameError: name 'undefined' is not defined (FILE, line 3)"),
        ("import not_installed\n", "ModuleNotFoundError: No module named 'not_installed' (FILE, line 1)"),
        ("raise ValueError('no weights')\n", "ValueError: no weights (FILE, line 1)"),
        ("def score(:\n", "SyntaxError: invalid syntax (broken.py, line 1)"),
    ],
)
def test_an_error_of_the_imported_module_says_its_place(program, reason, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    reason = reason.replace("FILE", str(tmp_path / "broken.py"))
    said = f"section.field = 'broken:score': importing broken raised {reason}"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$") as refused:
        import_named("section.field", "broken:score")
    assert type(refused.value.__cause__).__name__ == reason.partition(":")[0]
