"""The pages: every command composes, every key and preset exists, every link leads somewhere, README stays short."""

import re
import shlex

import pytest

from lr2train.cli import door, help
from lr2train.config import CONF_FOLDER, READS, Config
from tools.docs import PAGES, ROOT, Command, blocks, spans

KEYS = {key.name for key in help._keys(Config)}
GROUPS = {folder.name for folder in CONF_FOLDER.iterdir() if folder.is_dir()}
OTHERS = {  # programs that a reader has from elsewhere
    "bash", "cat", "cp", "curl", "git", "llama-server", "mkdir", "pip", "python", "source", "tail", "tensorboard",
    "vllm", "wandb",
}  # fmt: skip
OPEN = ("engine.deepspeed.", "data.keep_below.", "model.overrides.", "model.architecture.")  # keys of others below
_NAMED = {one: re.compile(re.escape(one).replace(r"\.NAME\.", r"\.\w+\.")) for one in KEYS}
OF_VERBS = {one.text: one for page in PAGES for one in blocks(page) if one.verb}
OF_OTHERS = [one for page in PAGES for one in blocks(page) if not one.verb and one.text != "lr2train"]


def load_only(monkeypatch, one: Command) -> None:
    """Compose and check the command's config as the verb does, and run nothing."""
    verb, arguments = one.verb or ("", [])
    monkeypatch.setattr("sys.argv", [verb, *arguments])

    def job(_: Config) -> None: ...

    job.__module__ = f"lr2train.{verb}"
    door.main(verb, job)


@pytest.mark.parametrize("one", OF_VERBS.values(), ids=str)
def test_a_verbs_command_is_accepted_and_every_key_is_read(monkeypatch, capsys, one):
    verb, arguments = one.verb or ("", [])
    assert verb in (*READS, "report")
    if verb == "report":
        assert all(argument.startswith(("runs/", "--out")) for argument in arguments)
    elif "--help" not in arguments:
        load_only(monkeypatch, one)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("one", OF_OTHERS, ids=str)
def test_another_programs_command_names_files_and_flags_that_exist(one):
    words = shlex.split(one.text, comments=True)
    assert words[0] in OTHERS
    for word in words:
        if re.fullmatch(r"\.?/?(launch|tools|tests|conf|serving)/[\w./]+", word) or word.startswith("requirements"):
            assert (ROOT / word).exists(), word
    if words[:2] == ["python", "-m"] and words[2].startswith("tools"):
        file = ROOT / f"{words[2].replace('.', '/')}.py"
    elif words[0] == "python" and words[1].startswith("tools/"):
        file = ROOT / words[1]
    else:
        return
    known = "".join(each.read_text() for each in [file, *file.parent.glob("*.py"), *file.parent.glob("serving/*.py")])
    assert [flag for flag in words if flag.startswith("--") and not re.search(rf"\b{flag[2:]}\b", known)] == []


def test_code_in_prose_that_looks_like_a_key_is_one():
    unknown = []
    for page in PAGES:
        for line, text in spans(page):
            for key, value in re.findall(r"(?<![\w./])([a-z_]+(?:\.\w+)*)=([^\s,`']*)", text):
                if not _exists(key, value):
                    unknown.append(f"{page.name}:{line}: {key}={value}")
            if (
                not text.endswith((".json", ".jsonl", ".npy", ".png"))
                and re.fullmatch(rf"(?:{'|'.join(_sections())})(?:\.\w+)+", text)
                and not _exists(text, None)
            ):
                unknown.append(f"{page.name}:{line}: {text}")
    assert unknown == []


def _sections() -> set[str]:
    return {key.split(".")[0] for key in KEYS if "." in key}


def _exists(key: str, value: str | None) -> bool:
    """Whether a key is in the schema, or a preset in ``conf/``; entries of lists have any name."""
    first = key.split(".")[0]
    if first not in _sections() | GROUPS | {one for one in KEYS if "." not in one}:
        return True  # of another program
    if "." not in key and key in GROUPS and value not in (None, "", "…", "NAME"):
        return (CONF_FOLDER / key / f"{value}.yaml").is_file()
    if "." not in key or key.startswith(OPEN):
        return True
    return any(_NAMED[one].fullmatch(key) or one.startswith(f"{key}.") for one in KEYS)


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", page.read_text()):
        path, _, anchor = (target[0] or target[1]).partition("#")
        if path.startswith("http"):
            continue
        file = (page.parent / path).resolve() if path else page
        headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE) if file.suffix == ".md" else []
        if not file.exists() or (anchor and anchor not in map(slug, headings)):
            broken.append(target)
    assert broken == []


README = (ROOT / "README.md").read_text().splitlines()


def test_readme_is_short():
    assert len(README) < 153
    assert [line for line in README if len(line) > 120] == []


def test_no_line_of_readmes_tables_holds_three_figures():
    rows = [line for line in README if line.startswith("|")]
    assert len(rows) > 10
    assert [row for row in rows if len(re.findall(r"(?<![\w.`])\d[\d.,e+]*(?![\w`])", row)) > 2] == []


def test_pictures_are_small():
    assert sum(file.stat().st_size for file in (ROOT / "docs" / "pictures").iterdir()) < 200_000
