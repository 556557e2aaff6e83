"""`editrl`: dispatch, exit codes and one-line errors."""

import json
import re
import sys

import pytest

from editrl.cli import main, table
from editrl.errors import EditrlError
from editrl.registry import Entry


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Installs `editrl example`, a third party's command whose behaviour the test gives."""

    def install(function):
        info = tmp_path / "fake_command-3.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-command\nVersion: 3.1\n")
        (info / "entry_points.txt").write_text("[editrl.commands]\nexample = fake_command:run\n")
        (tmp_path / "fake_command.py").write_text('def run(argv):\n    """Show what was said."""\n')
        monkeypatch.syspath_prepend(tmp_path)
        module = type(sys)("fake_command")
        module.run = function
        monkeypatch.setitem(sys.modules, "fake_command", module)

    return install


def raising(error):
    def run(argv):
        raise error

    return run


def test_a_command_gets_the_words_after_its_name(command, capsys):
    command(lambda argv: print(argv))
    assert main(["example", "--seed", "3"]) == 0
    assert capsys.readouterr().out == "['--seed', '3']\n"


def test_a_commands_number_is_the_exit_code(command):
    command(lambda argv: 7)
    assert main(["example"]) == 7


def test_other_packages_commands_stand_in_the_help(command, capsys):
    command(lambda argv: 0)
    main(["--help"])
    assert re.search(r"^  example +Show what was said\.$", capsys.readouterr().out, re.MULTILINE)


def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: editrl COMMAND")


def test_the_version_is_printed(capsys):
    import editrl

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"editrl {editrl.__version__}\n"


def test_an_unknown_command_suggests_the_nearest(capsys):
    assert main(["reward"]) == 2
    error = capsys.readouterr().err
    assert error == "editrl: no command is called 'reward'. Did you mean 'rewards'? `editrl --help` lists them\n"


def test_an_editrl_error_is_one_line_and_exit_code_2(command, capsys):
    command(raising(EditrlError("data.jsonl:3: no column 'source'\n  add it")))
    assert main(["example"]) == 2
    assert capsys.readouterr().err == "editrl: data.jsonl:3: no column 'source' add it\n"


@pytest.mark.parametrize("argv", [["--debug", "example"], ["example", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(command, capsys, argv):
    command(raising(EditrlError("wrong")))
    assert main(argv) == 2
    assert "Traceback" in (error := capsys.readouterr().err)
    assert error.endswith("editrl: wrong\n")


def test_the_field_debug_of_the_training_arguments_can_still_be_given(command, capsys):
    command(lambda argv: print(argv))
    main(["example", "--debug=underflow_overflow", "--debug"])
    assert capsys.readouterr().out == "['--debug=underflow_overflow']\n"


def test_a_bug_is_not_dressed_up_as_a_users_mistake(command):
    command(raising(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        main(["example"])


def test_ctrl_c_is_exit_code_130(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert main(["example"]) == 130
    assert capsys.readouterr().err == "editrl: interrupted\n"


# editrl rewards, policies, recipes


def test_rewards_lists_name_summary_and_origin_in_columns(capsys):
    assert main(["rewards"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("pickscore ") and line.endswith(" editrl.rewards.pickscore") for line in lines)


def test_policies_lists_json_for_programs(capsys):
    assert main(["policies", "--json"]) == 0
    [entry] = [e for e in json.loads(capsys.readouterr().out) if e["name"] == "hunyuan_video"]
    assert entry["origin"] == "editrl.policies.hunyuan_video.policy"
    assert entry["summary"]


def test_a_person_gets_a_table(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    table.print_entries([Entry("glow", "Light [of a clip].", "mine.py:3")])
    out = capsys.readouterr().out
    assert "what it is" in out
    assert "Light [of a clip]." in out


def test_an_unknown_flag_of_a_command_suggests_the_nearest(capsys):
    assert main(["rewards", "--jsn"]) == 2
    assert "has no option --jsn. Did you mean '--json'?" in capsys.readouterr().err


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    (tmp_path / "viva").mkdir()
    (tmp_path / "viva" / "grpo.yaml").write_text("# Edit-GRPO of a 13B editor.\n# More.\nseed: 3\n")
    monkeypatch.setattr("editrl.cli.recipes.files", lambda package: tmp_path)
    return tmp_path


def test_recipes_lists_names_with_their_first_comment(recipes, capsys):
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out == f"viva/grpo  Edit-GRPO of a 13B editor.  {recipes}/viva/grpo.yaml\n"


def test_recipes_name_prints_the_file_and_path_its_place(recipes, capsys):
    assert main(["recipes", "viva/grpo"]) == 0
    assert capsys.readouterr().out == (recipes / "viva" / "grpo.yaml").read_text()
    assert main(["recipes", "viva/grpo", "--path"]) == 0
    assert capsys.readouterr().out == f"{recipes}/viva/grpo.yaml\n"


@pytest.mark.parametrize(
    ("argv", "error"), [(["viva/grop"], "Did you mean 'viva/grpo'?"), (["--path"], "wants the NAME of a recipe")]
)
def test_recipes_errors_are_one_line(recipes, capsys, argv, error):
    assert main(["recipes", *argv]) == 2
    assert error in capsys.readouterr().err
