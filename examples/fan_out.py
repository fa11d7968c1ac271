"""The words of a thousand files are counted, each by a run of its own, fifty at once.

mkdir texts; for n in $(seq 1000); do echo "the words of $n" > texts/$n.txt; done
beatless --app fan_out:app dev     # then, in a second terminal in the same directory:
beatless start count_words --input '{"folder": "'$PWD'/texts"}' --follow
"""

from pathlib import Path
from typing import Any

from beatless import App, ChildFailed, Plan, RunContext, Settings, StepContext, plan, retry, step


@step
def list_files(_: StepContext, folder: str) -> list[str]:
    """Stored: a file that is added later does not change what this run counts."""
    return sorted(str(path) for path in Path(folder).iterdir() if path.suffix == ".txt")


@step(timeout=60, retry=retry(max_attempts=3))
def count(ctx: StepContext) -> int:
    return len(Path(ctx.input["file"]).read_text().split())


one_file = Plan("count_words_of_a_file", [count])


@plan("count_words")
def count_words(run: RunContext) -> dict[str, Any]:
    """Any worker takes any file; a killed one costs the files that it had, and no other."""
    files = run.step(list_files, run.input["folder"])
    found = run.map(one_file, [{"file": name} for name in files], at_once=50, failure="collect")
    counts, unread = 0, []
    for name, words in zip(files, found, strict=True):
        if isinstance(words, ChildFailed):
            unread.append({"file": name, "why": words.message})
        else:
            counts += words
    return {"files": len(files), "words": counts, "unread": unread}


app = App(Settings.from_env(), [count_words, one_file])
