from structure import circle, figures, imports, modules


def test_no_import_circle():
    assert not circle(), " → ".join(circle())


def test_no_module_imports_the_package_root():
    assert not [name for name, used in imports(modules()).items() if "dmin" in used]


def test_figures_are_kept():
    # The number of lines is an aim that is not reached yet: ROADMAP.md.
    assert not [each for each in figures() if not each[-1] and each[0] != "lines of dmin/"]
