"""The registry: what a spec means, and what the errors say when it means nothing."""

import inspect
import subprocess
import sys
import textwrap

import pytest

from editrl import registry
from editrl.errors import EditrlError
from editrl.registry import Entry, list_rewards, load_policy, load_reward, register_policy, register_reward


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    monkeypatch.setattr(registry.rewards, "_registered", {})
    monkeypatch.setattr(registry.policies, "_registered", {})


@pytest.fixture
def write(tmp_path):
    def write_file(name, text):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def install(tmp_path, monkeypatch, write):
    """Makes a distribution with entry points importable, as pip would."""

    def install_package(name, version, code, entry_points):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))
        if code is not None:
            write(f"{name}.py", code)
        monkeypatch.syspath_prepend(tmp_path)

    yield install_package
    for module in [m for m in sys.modules if m.startswith("fake_")]:
        del sys.modules[module]


def brightness(videos, scale=1.0):
    """Mean value of a clip."""
    return [scale * float(video) for video in videos]


class Contrast:
    """Spread of the values of a clip."""

    def __init__(self, gain=1.0):
        self.gain = gain

    def __call__(self, videos):
        return [self.gain for _ in videos]


# What a spec means


def test_an_object_is_itself():
    assert load_reward(brightness) is brightness


def test_a_registered_name_is_the_function_that_was_decorated():
    assert register_reward("brightness")(brightness) is brightness
    assert load_reward("brightness") is brightness


def test_a_class_is_instantiated_with_the_arguments():
    register_reward("contrast")(Contrast)
    assert load_reward("contrast", gain=3.0)([0, 0]) == [3.0, 3.0]


def test_a_function_gets_its_arguments_bound_and_keeps_its_name():
    bound = load_reward(brightness, scale=2.0)
    assert bound([1, 2]) == [2.0, 4.0]
    assert (bound.__name__, bound.__doc__) == ("brightness", "Mean value of a clip.")


def test_a_bound_argument_no_longer_looks_required():
    """RewardSet reads signatures to learn which columns a reward needs."""

    def needs(videos, threshold):
        return [threshold for _ in videos]

    parameter = inspect.signature(load_reward(needs, threshold=0.5)).parameters["threshold"]
    assert parameter.default == 0.5


def test_a_dotted_path_is_imported():
    assert load_reward("statistics:mean").__module__ == "statistics"


def test_a_file_is_run_once_for_all_the_names_in_it(write):
    path = write(
        "two.py",
        """
        from dataclasses import dataclass

        def first(videos): return [1.0 for _ in videos]

        @dataclass
        class Second:
            value: float = 2.0
            def __call__(self, videos): return [self.value for _ in videos]
        """,
    )
    first, second = load_reward(f"{path}:first"), load_reward(f"{path}:Second", value=5.0)
    assert first([0]) == [1.0]
    assert second([0]) == [5.0]
    assert first.__module__ == type(second).__module__


def test_a_file_may_register_its_rewards_and_be_loaded_again(write):
    path = write(
        "mine.py",
        """
        from editrl import register_reward

        @register_reward("mine")
        def mine(videos): return [0.0 for _ in videos]
        """,
    )
    assert load_reward(f"{path}:mine") is load_reward("mine")


def test_an_entry_point_is_imported_when_it_is_loaded(install):
    install("fake_package", "1.2", "def glow(videos): return [7.0]\n", "[editrl.rewards]\nglow = fake_package:glow\n")
    assert "fake_package" not in sys.modules
    assert load_reward("glow")([0]) == [7.0]


def test_a_package_may_both_declare_and_register_the_same_reward(install):
    code = "import editrl\n@editrl.register_reward('glow')\ndef glow(videos): return [7.0]\n"
    install("fake_package", "1.2", code, "[editrl.rewards]\nglow = fake_package:glow\n")
    assert load_reward("glow") is load_reward("fake_package:glow")
    assert [entry.name for entry in list_rewards()].count("glow") == 1


def test_load_policy_hands_path_and_arguments_to_from_pretrained():
    @register_policy("tiny")
    class Tiny:
        @classmethod
        def from_pretrained(cls, path, dtype="float32"):
            return path, dtype

    assert load_policy("tiny", "models/tiny", dtype="bfloat16") == ("models/tiny", "bfloat16")


# Names


def test_a_name_can_be_registered_again_by_its_own_definition():
    """A reload, or a notebook cell that was run twice, makes a new object of the same module and qualified name."""

    def define():
        @register_reward("again")
        def again(videos):
            return []

        return again

    define()
    second = define()
    assert load_reward("again") is second


def test_a_second_owner_of_a_name_is_refused_and_both_places_are_named():
    register_reward("taken")(brightness)
    with pytest.raises(EditrlError) as error:
        register_reward("taken")(Contrast)
    lines = [f"test_registry.py:{inspect.getsourcelines(owner)[1]}" for owner in (brightness, Contrast)]
    assert all(line in str(error.value) for line in lines)


def test_a_registered_name_must_not_hide_an_installed_one(install):
    install("fake_package", "1.2", "def glow(videos): return []\n", "[editrl.rewards]\nglow = fake_package:glow\n")
    with pytest.raises(EditrlError, match=r"test_registry.py:\d+ .*fake_package \(fake_package 1.2\)"):
        register_reward("glow")(brightness)


def test_two_packages_with_one_name_are_an_error_that_names_both(install):
    install("fake_one", "1.0", "def glow(videos): return []\n", "[editrl.rewards]\nglow = fake_one:glow\n")
    install("fake_two", "2.0", "def glow(videos): return []\n", "[editrl.rewards]\nglow = fake_two:glow\n")
    with pytest.raises(EditrlError, match=r"fake_one 1\.0") as error:
        load_reward("glow")
    assert "fake_two 2.0" in str(error.value)


@pytest.mark.parametrize("name", ["", "a:b", "file.py", brightness])
def test_a_name_that_could_not_be_looked_up_is_refused(name):
    with pytest.raises(EditrlError, match="@register_reward"):
        register_reward(name)


# Errors: one line each, with what to do


def test_an_unknown_name_suggests_the_nearest_and_how_to_list_them():
    register_reward("brightness")(brightness)
    with pytest.raises(EditrlError, match=r"'brigthness'. Did you mean 'brightness'\? `editrl rewards` lists them"):
        load_reward("brigthness")
    with pytest.raises(EditrlError, match="`editrl policies` lists them"):
        load_policy("nothing_like_it", "path")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(EditrlError, match=rf"there is no file {tmp_path}/none.py"):
        load_reward(f"{tmp_path}/none.py:Name")


def test_a_file_without_a_name_says_how_to_add_it():
    with pytest.raises(EditrlError, match=r"mine\.py:Name"):
        load_reward("mine.py")


def test_a_missing_attribute_suggests_the_nearest(write):
    path = write("rewards.py", "def sharpness(videos): return []\n")
    with pytest.raises(EditrlError, match=r"rewards\.py has no 'sharpnes'\. Did you mean 'sharpness'\?"):
        load_reward(f"{path}:sharpnes")


@pytest.mark.parametrize(
    ("code", "cause"),
    [("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"), ("def f(:", "SyntaxError")],
)
def test_a_file_that_cannot_be_imported_says_why_in_one_line(write, code, cause):
    path = write("broken.py", code)
    for _ in range(2):  # the half-run module must not be found the second time
        with pytest.raises(EditrlError, match=cause) as error:
            load_reward(f"{path}:f")
        assert "\n" not in str(error.value)
        assert error.value.__cause__ is not None


def test_a_bug_in_a_file_keeps_its_own_traceback(write):
    with pytest.raises(ZeroDivisionError):
        load_reward(f"{write('bug.py', '1 / 0')}:f")


def test_a_module_that_cannot_be_imported_says_why():
    with pytest.raises(EditrlError, match="cannot import no_such_module: ModuleNotFoundError"):
        load_reward("no_such_module:Reward")


@pytest.mark.parametrize("reward", [brightness, Contrast])
def test_an_argument_that_a_reward_does_not_take_is_an_error(reward):
    with pytest.raises(EditrlError, match="unexpected keyword argument 'gian'"):
        load_reward(reward, gian=1.0)


def test_an_argument_error_suggests_the_nearest():
    with pytest.raises(EditrlError, match=r"Did you mean 'gain'\?"):
        load_reward(Contrast, gian=1.0)


def test_a_type_error_inside_a_constructor_is_not_mistaken_for_a_wrong_argument():
    class Broken:
        def __init__(self, gain):
            raise TypeError("inside")

    with pytest.raises(TypeError, match="inside") as error:
        load_reward(Broken, gain=1.0)
    assert not isinstance(error.value, EditrlError)


def test_what_cannot_be_called_is_no_reward():
    with pytest.raises(EditrlError, match=r"'statistics:NormalDist' .* cannot be called"):
        load_reward("statistics:NormalDist")


def test_what_has_no_from_pretrained_is_no_policy():
    with pytest.raises(EditrlError, match="has no from_pretrained"):
        load_policy(Contrast, "path")


# Lists


def test_a_list_reads_summaries_without_importing(install):
    code = 'raise RuntimeError("imported")\n\nclass Glow:\n    """Light of a clip.\n\n    More.\n    """\n'
    install("fake_package", "1.2", code, "[editrl.rewards]\nglow = fake_package:Glow\n")
    assert Entry("glow", "Light of a clip.", "fake_package (fake_package 1.2)") in list_rewards()


def test_a_list_does_not_import_the_parents_of_a_plugin_either(install, tmp_path):
    (tmp_path / "fake_parent").mkdir()
    (tmp_path / "fake_parent" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "fake_parent" / "child.py").write_text('def glow(videos):\n    """Light."""\n')
    install("fake_dist", "1", None, "[editrl.rewards]\nglow = fake_parent.child:glow\n")
    assert Entry("glow", "Light.", "fake_parent.child (fake_dist 1)") in list_rewards()


@pytest.mark.parametrize(
    ("code", "summary"), [(None, "(no module fake_gone)"), ("def f(:", "does not parse: line 1"), ("x = 1", "")]
)
def test_a_list_says_what_is_wrong_with_a_broken_plugin(install, code, summary):
    install("fake_gone", "1", code, "[editrl.rewards]\ngone = fake_gone:Gone\n")
    [entry] = [entry for entry in list_rewards() if entry.name == "gone"]
    assert summary in entry.summary
    assert bool(entry.summary) == bool(summary)


def test_registered_rewards_are_listed_with_their_line():
    register_reward("brightness")(brightness)
    [entry] = [entry for entry in list_rewards() if entry.name == "brightness"]
    assert entry.summary == "Mean value of a clip."
    assert entry.origin.endswith(f"test_registry.py:{inspect.getsourcelines(brightness)[1]}")


def test_our_own_plugins_are_listed_by_module_and_by_name_without_torch():
    code = "import sys, editrl\nprint(*(e.origin for e in editrl.list_rewards()))\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [f"editrl.rewards.{name}" for name in ("clip", "clip", "pickscore", "remote")]
