from pathlib import Path

from structure import circle, figures, imports, modules


def test_no_import_circle():
    assert not circle(), " → ".join(circle())


def test_no_module_imports_the_package_root():
    assert not [name for name, used in imports(modules()).items() if "dmin" in used]


def test_figures_are_kept():
    # The number of lines is an aim that is not reached yet: ROADMAP.md.
    assert not [each for each in figures() if not each[-1] and each[0] != "lines of dmin/"]


def test_every_file_of_tests_has_a_name_of_its_own():
    # Two of one name are one module to pytest, which then collects neither.
    names = [file.name for file in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(n for n in set(names) if names.count(n) > 1)
