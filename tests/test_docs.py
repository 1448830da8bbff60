"""The pages: every command composes, every key and preset exists, every link leads somewhere, README stays short."""

import itertools
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import pytest

from lr2train.cli import door, help
from lr2train.config import CONF_FOLDER, READS, Config, reads
from tools.docs import PAGES, ROOT, blocks, spans

KEYS = {key.name for key in help._keys(Config)}
GROUPS = {folder.name for folder in CONF_FOLDER.iterdir() if folder.is_dir()}
OTHERS = re.compile(  # programs that a reader has from elsewhere
    "bash|cat|cp|curl|for|git|llama-server|mkdir|pip|printf|python|rm|source|tail|tensorboard|torchrun|vllm|wandb"
)
OPEN = ("engine.deepspeed.", "data.keep_below.", "model.overrides.", "model.architecture.")  # keys of others below
_NAMED = {one: re.compile(re.escape(one).replace(r"\.NAME\.", r"\.\w+\.")) for one in KEYS}
OF_VERBS = [one for page in PAGES for one in blocks(page) if one.verb]
OF_OTHERS = [one for page in PAGES for one in blocks(page) if not one.verb and one.text != "lr2train"]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with the config files that the pages have a reader write."""
    folder = tmp_path_factory.mktemp("reader")
    for one in OF_OTHERS:
        if found := re.match(r"cat > (conf/\S+) <<'(\w+)'\n(.*)^\2$", one.text, re.DOTALL | re.MULTILINE):
            (folder / found[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / found[1]).write_text(found[3])
    assert (folder / "conf" / "experiment" / "mine.yaml").is_file()
    return folder


def load_only(monkeypatch, verb: str, arguments: Iterable[str]) -> None:
    """Compose and check a command's config as the verb does, and run nothing."""
    monkeypatch.setattr("sys.argv", [verb, *arguments])

    def job(_: Config) -> None: ...

    job.__module__ = f"lr2train.{verb}"
    door.main(verb, job)


def together() -> dict[str, list[str]]:
    """Commands of a verb and an experiment joined, as far as no key has two values: a composition takes long."""
    joined: dict[str, dict[str, str]] = {}
    for one in OF_VERBS:
        verb, arguments = one.verb or ("", [])
        if verb != "report" and not any(argument.startswith("--") for argument in arguments):
            pairs = {argument.partition("=")[0]: argument for argument in arguments}
            names = (f"{verb} {pairs.get('experiment', '')} {number}" for number in itertools.count())
            name = next(n for n in names if all(joined.get(n, {}).get(k, v) == v for k, v in pairs.items()))
            joined.setdefault(name, {}).update(pairs)
    return {name: list(pairs.values()) for name, pairs in joined.items()}


@pytest.mark.parametrize(("name", "arguments"), together().items(), ids=together())
def test_verbs_accept_the_commands_and_read_every_key(monkeypatch, capsys, written, name, arguments):
    monkeypatch.chdir(written)
    load_only(monkeypatch, name.split()[0], arguments)
    assert capsys.readouterr().err == ""


def test_the_other_commands_of_verbs_name_verbs_runs_and_flags():
    for one in OF_VERBS:
        verb, arguments = one.verb or ("", [])
        assert verb in (*READS, "report"), one
        flags = {argument for argument in arguments if argument.startswith("--")}
        assert flags <= {"--help", "--cfg", "--out", "--multirun"}, one
        if verb == "report":
            assert all(argument.startswith("runs/") for argument in arguments if argument not in flags), one


def test_a_command_without_needs_runs_after_the_demo():
    """It names runs of the demo, or runs that the page has made before, and nothing that a laptop has not."""
    made = set(re.findall(r"name=(\w+)", (ROOT / "launch" / "demo.sh").read_text())) | {"first"}
    for one in (one for page in PAGES for one in blocks(page) if not one.needs):
        made |= set(re.findall(r"\bname=(\w+)", one.text))
        assert set(re.findall(r"\brun=(\w+)|(?<![\w/.])runs/(\w+)", one.text.split(" > ")[0])) <= {
            pair for name in made for pair in ((name, ""), ("", name))
        }, one
        assert not re.search(r"/models/|/data/|/venvs/", one.text), one
        assert one.verb is None or one.verb[0] in ("plan", "rehearse") or "_128k" not in one.text, one


@pytest.mark.parametrize("one", OF_OTHERS, ids=str)
def test_another_programs_command_names_files_and_flags_that_exist(one):
    words = shlex.split(one.text.splitlines()[0], comments=True)
    assert OTHERS.fullmatch(words[0])
    for word in words if ">" not in words else ():
        if re.fullmatch(r"\.?/?(launch|tools|tests|conf|serving)/[\w./]+", word) or word.startswith("requirements"):
            assert (ROOT / word).exists(), word
    modules = [after for before, after in itertools.pairwise(words) if before == "-m" and after.startswith("tools.")]
    if modules:
        file = ROOT / f"{modules[0].replace('.', '/')}.py"
        words = words[words.index("-m") :]
    elif words[0] == "python" and words[1].startswith("tools/"):
        file = ROOT / words[1]
    else:
        return
    known = "".join(each.read_text() for each in [file, *file.parent.glob("*.py"), *file.parent.glob("serving/*.py")])
    assert [flag for flag in words if flag.startswith("--") and not re.search(rf"\b{flag[2:]}\b", known)] == []


def test_code_in_prose_that_looks_like_a_key_is_one():
    unknown = []
    for page in PAGES:
        if page.name in ("RESULTS.md", "LOG.md"):  # figures keep the names of their day
            continue
        for line, text in spans(page):
            for key, value in re.findall(r"(?<![\w./])([a-z_]+(?:\.\w+)*)=([^\s,`']*)", text):
                if not _exists(key, value):
                    unknown.append(f"{page.name}:{line}: {key}={value}")
            if (
                not re.search(r"\.(jsonl?|npy|png|gguf)$", text)
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
    if "." not in key and key in GROUPS and value not in (None, "", "…", "NAME", "mine"):
        return (CONF_FOLDER / key / f"{value}.yaml").is_file()
    if "." not in key or key.startswith(OPEN):
        return True
    return any(_NAMED[one].fullmatch(key) or one.startswith(f"{key}.") for one in KEYS)


@pytest.mark.parametrize("verb", ["train", "search", "evaluate"])
def test_every_remedy_of_the_symptoms_is_accepted(monkeypatch, capsys, verb):
    page = next(page for page in PAGES if page.name == "SYMPTOMS.md")
    pairs = [re.fullmatch(r"([a-z_]+(?:\.\w+)*)=([^\s…]+)", text) for _, text in spans(page)]
    keys = {one[1]: one[0] for one in pairs if one and reads(verb, one[1])}
    assert len(keys) >= 3
    load_only(monkeypatch, verb, ["name=x", "data.path=x", "model.path=x", *keys.values()])
    assert capsys.readouterr().err == ""


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


def test_every_experiment_is_in_the_table():
    table = "".join(line for line in README if line.startswith("|"))
    assert [file.stem for file in (CONF_FOLDER / "experiment").iterdir() if f"`{file.stem}`" not in table] == []


def test_pictures_are_small():
    assert sum(file.stat().st_size for file in (ROOT / "docs" / "pictures").iterdir()) < 200_000
