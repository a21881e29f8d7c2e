"""How the shipped set is made: blueprint -> writing -> blind rating sheets -> the set.

    python -m interp.sets.make blueprint DIR          one JSON sheet of 20 prompts per writing hand
    python -m interp.sets.make check FILE SHEET       form of one hand's writing (never its rating)
    python -m interp.sets.make sheets DIR             shuffled rating sheets without any blueprint
    python -m interp.sets.make assemble DIR OUT       join writing and both raters' grades

Topic, flaw, voice and length band are drawn independently of each other and of any target score;
difficulty shifts only how often a flaw is drawn, so that prompts differ in how well they are
answered. Nothing here contains completion text: hands write it, raters grade it, this joins it.
"""

import hashlib
import json
import random
import re
import sys
from pathlib import Path

SEED = 20261122
HANDS, PROMPTS_PER_HAND, SLOTS = 12, 20, 4
TOPICS = (
    "science", "mathematics", "programming", "history and society", "health and safety",
    "cooking and household", "writing and rewriting", "summarising", "advice and planning",
    "language and translation", "reasoning puzzles", "checkable constraints", "decline or redirect",
)  # fmt: skip
FLAWS = (
    "factual_error", "reasoning_error", "ignores_constraint", "incomplete", "off_topic", "vague",
    "overclaims", "sycophantic", "needless_refusal", "unsafe", "incoherent",
)  # fmt: skip
VOICES = ("plain", "warm", "formal", "brisk", "chatty", "scholarly")
BANDS = ((30, 50), (50, 75), (75, 100), (100, 130))
#: Share of rows without a flaw, by the prompt's difficulty.
SOUND = {"easy": 0.62, "medium": 0.36, "hard": 0.12}
#: How good a sound answer is, and how bad a flaw is, by difficulty (weights of the three grades).
GRADES = {"sound": ("solid", "strong", "excellent"), "flawed": ("slight", "clear", "grave")}
WEIGHTS = {"easy": (3, 2, 1), "medium": (1, 1, 1), "hard": (1, 2, 3)}
TWINS = 66


def deck(values, size: int, rng: random.Random) -> list:
    """`size` draws from `values` in equal shares, shuffled (a deck, so that no value runs short)."""
    cards = [values[i % len(values)] for i in range(size)]
    rng.shuffle(cards)
    return cards


def draw_blueprint(seed: int = SEED) -> list[dict]:
    """240 prompts with four rows each: what each row is to be, before anything is written."""
    rng = random.Random(seed)
    prompts = HANDS * PROMPTS_PER_HAND
    rows = prompts * SLOTS
    topics = deck(TOPICS, prompts, rng)
    difficulties = deck(tuple(SOUND), prompts, rng)
    twins = set(rng.sample(range(prompts), TWINS))
    levels = iter(deck(("elementary", "hard"), TWINS, rng))
    wrong = iter(deck(("factual_error", "reasoning_error"), TWINS, rng))
    voices, bands = iter(deck(VOICES, rows, rng)), iter(deck(BANDS, rows, rng))
    flaws = iter(_flaw_deck(rows, rng))
    plan = []
    for index in range(prompts):
        slots = []
        for slot in range(SLOTS):
            flaw = "none" if rng.random() < SOUND[difficulties[index]] else next(flaws)
            slots.append(_slot(slot, flaw, next(voices), next(bands), difficulties[index], rng))
        level = None
        if index in twins:
            level = next(levels)
            first, second = slots[0], slots[1]
            first.update(flaw="none", grade=rng.choice(GRADES["sound"]))
            second.update(flaw=next(wrong), grade="twin", twin_of=0)
            second.update(voice=first["voice"], band=first["band"])
        plan.append(
            {
                "key": f"p{index:03d}",
                "hand": index // PROMPTS_PER_HAND,
                "topic": topics[index],
                "difficulty": difficulties[index],
                "level": level,
                "slots": slots,
            }
        )
    return plan


def _flaw_deck(rows: int, rng: random.Random) -> list[str]:
    """Flaws in equal shares in every run of 44, the two that twins use at a lower share."""
    shares = [f for f in FLAWS for _ in range(2 if f in ("factual_error", "reasoning_error") else 4)]
    cards: list[str] = []
    while len(cards) < rows:
        rng.shuffle(shares)
        cards += shares
    return cards


def _slot(slot, flaw, voice, band, difficulty, rng) -> dict:
    kind = "sound" if flaw == "none" else "flawed"
    weights = WEIGHTS[difficulty] if kind == "flawed" else WEIGHTS[difficulty][::-1]
    grade = rng.choices(GRADES[kind], weights)[0]
    return {"slot": slot, "flaw": flaw, "grade": grade, "voice": voice, "band": list(band), "twin_of": None}


def prompt_id(prompt: str) -> str:
    """First 12 hex digits of the sha1 of the lower-cased prompt with white space collapsed."""
    return hashlib.sha1(" ".join(prompt.lower().split()).encode()).hexdigest()[:12]


def part(identifier: str) -> str:
    """Half of the prompts, by a fixed hash, are sealed until text and ratings are final."""
    return "sealed" if int(hashlib.sha256(identifier.encode()).hexdigest(), 16) % 2 else "open"


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’.-][^\W_]+)*", text.lower())


def check_hand(written: list[dict], sheet: list[dict]) -> list[str]:
    """Problems of form in one hand's writing: bands, flaw quotes, twins, shared phrases."""
    problems, seen = [], {}
    by_key = {entry["key"]: entry for entry in written}
    for plan in sheet:
        entry = by_key.get(plan["key"])
        if entry is None:
            problems.append(f"{plan['key']}: missing")
            continue
        texts = [c["text"] for c in sorted(entry["completions"], key=lambda c: c["slot"])]
        if len(texts) != SLOTS:
            problems.append(f"{plan['key']}: {len(texts)} completions, expected {SLOTS}")
            continue
        for slot, text, entry_slot in zip(
            plan["slots"], texts, sorted(entry["completions"], key=lambda c: c["slot"]), strict=True
        ):
            name = f"{plan['key']}/{slot['slot']}"
            count = len(text.split())
            low, high = slot["band"]
            if not low <= count <= high:
                problems.append(f"{name}: {count} words, band {low}-{high}")
            quote = entry_slot.get("flaw_quote")
            if (slot["flaw"] == "none") != (not quote):
                problems.append(f"{name}: flaw {slot['flaw']} with flaw_quote {quote!r}")
            elif quote and quote not in text:
                problems.append(f"{name}: flaw_quote is not in the text: {quote!r}")
            if slot["twin_of"] is not None:
                changed = sum(a != b for a, b in zip(texts[0].split(), text.split(), strict=False))
                if not 1 <= changed <= 4 or len(texts[0].split()) != count:
                    problems.append(f"{name}: a twin changes 1 to 4 words in place, here {changed}")
            start = " ".join(words(text)[:3])
            if seen.setdefault(("start", start), name) != name and slot["twin_of"] is None:
                problems.append(f"{name}: starts like {seen['start', start]}: {start!r}")
            for i in range(len(words(text)) - 7):
                run = " ".join(words(text)[i : i + 8])
                other = seen.setdefault(("run", run), name)
                if other.split("/")[0] != plan["key"]:
                    problems.append(f"{name}: shares 8 words with {other}: {run!r}")
                    break
    return problems


def rows_of(plan: list[dict], written: list[dict]) -> list[dict]:
    """The set's rows before rating, in blueprint order."""
    by_key = {entry["key"]: entry for entry in written}
    rows = []
    for entry in plan:
        prompt = by_key[entry["key"]]["prompt"].strip()
        done = sorted(by_key[entry["key"]]["completions"], key=lambda c: c["slot"])
        texts = [c["text"].strip() for c in done]
        identifier = prompt_id(prompt)
        for slot, text, completion in zip(entry["slots"], texts, done, strict=True):
            at = None if slot["flaw"] == "none" else text.index(completion["flaw_quote"].strip())
            if slot["twin_of"] is not None:
                at = next(i for i, (a, b) in enumerate(zip(texts[0], text, strict=False)) if a != b)
            rows.append(
                {
                    "row": f"{entry['key']}-{slot['slot']}",
                    "prompt_id": identifier,
                    "prompt": prompt,
                    "completion": text,
                    "flaw": slot["flaw"],
                    "flaw_at": at,
                    "topic": entry["topic"],
                    "voice": slot["voice"],
                    "length_band": "-".join(map(str, slot["band"])),
                    "intended": {"difficulty": entry["difficulty"], "grade": slot["grade"]},
                    "part": part(identifier),
                    "twin_of": None if slot["twin_of"] is None else f"{entry['key']}-{slot['twin_of']}",
                    "level": entry["level"] if slot["slot"] < 2 else None,
                }
            )
    return rows


def rating_sheets(rows: list[dict], raters: int = 2, pages: int = 4, seed: int = SEED) -> dict[str, list[dict]]:
    """`{sheet name: rows}`: every rater grades every row, in an order of its own, text only."""
    sheets = {}
    for rater in range(raters):
        order = list(rows)
        random.Random(seed + 1 + rater).shuffle(order)
        for page in range(pages):
            chosen = order[page::pages]
            sheets[f"rater{rater}-{page}"] = [{k: r[k] for k in ("row", "prompt", "completion")} for r in chosen]
    return sheets


ASPECTS = ("instruction_following", "truthfulness", "honesty", "helpfulness")


def join_ratings(rows: list[dict], grades: list[dict[str, dict]]) -> list[dict]:
    """Rows with `ratings` (overall of each rater), `aspects` (their means) and `score` (mean)."""
    joined = []
    for row in rows:
        given = [g[row["row"]] for g in grades]
        overall = [float(g["overall"]) for g in given]
        mean = {a: sum(float(g[a]) for g in given) / len(given) for a in ASPECTS}
        rated = {"score": sum(overall) / len(overall), "aspects": mean, "ratings": overall}
        order = ("row", "prompt_id", "prompt", "completion")
        rest = {k: v for k, v in row.items() if k not in order}
        joined.append({**{k: row[k] for k in order}, **rated, **rest})
    return joined


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main(command: str, *arguments: str) -> None:
    folder = Path(arguments[0])
    if command == "blueprint":
        folder.mkdir(parents=True, exist_ok=True)
        for hand in range(HANDS):
            _write(folder / f"hand{hand:02d}.jsonl", [p for p in draw_blueprint() if p["hand"] == hand])
    elif command == "check":
        problems = check_hand(_read(folder), _read(Path(arguments[1])))
        print("\n".join(problems) or "no problem of form")
    elif command == "sheets":
        rows = rows_of(*_plan_and_writing(folder))
        for name, sheet in rating_sheets(rows).items():
            _write(folder / f"{name}.jsonl", sheet)
    elif command == "assemble":
        rows = rows_of(*_plan_and_writing(folder))
        grades = [
            {g["row"]: g for path in sorted(folder.glob(f"grades{r}-*.jsonl")) for g in _read(path)} for r in range(2)
        ]
        _write(Path(arguments[1]), join_ratings(rows, grades))
    else:
        raise SystemExit(__doc__)


def _plan_and_writing(folder: Path) -> tuple[list[dict], list[dict]]:
    written = [entry for path in sorted(folder.glob("written*.jsonl")) for entry in _read(path)]
    keys = {entry["key"] for entry in written}
    return [p for p in draw_blueprint() if p["key"] in keys], written


if __name__ == "__main__":
    main(*sys.argv[1:])
