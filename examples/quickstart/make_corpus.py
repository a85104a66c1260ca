"""Write the quickstart's corpus: small-town stories in two registers, and neutral texts in neither.

Every story is a small world (people, place, weather, what happened) that can be told plainly or ornately:

    plain.jsonl    the stories, told plainly                   for the adapter, class -1
    ornate.jsonl   the very same stories, told ornately        for the adapter, class +1
    neutral.jsonl  recipes, directions and weather notes       for the adapter, class 0
    base.jsonl     other stories and neutral texts, mixed      for the base model

In base.jsonl each sentence's register is drawn afresh, and titles are the same in both registers. So the base model
speaks both registers and is undecided at every sentence: that decision is what the adapter's class turns.

The same options always write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grammar
import words

PLAIN, ORNATE = 0, 1


class Words(dict[str, str]):
    """A text's facts; a name that is no fact is a random word of that pool ("alas_small": without its capital)."""

    def __init__(self, rng: random.Random, facts: dict[str, str]) -> None:
        super().__init__(facts)
        self.rng = rng

    def __missing__(self, name: str) -> str:
        word = self.rng.choice(words.WORDS[name.removesuffix("_small")])
        return word[0].lower() + word[1:] if name.endswith("_small") and not word.startswith("O ") else word


@dataclass(frozen=True)
class Story:
    """What happened, before it is told: a title, the facts of each register and the beats in their order."""

    title: str
    facts: tuple[dict[str, str], dict[str, str]]
    beats: tuple[grammar.Beat, ...]


def sentence(pattern: str, facts: dict[str, str], rng: random.Random) -> str:
    """The pattern with its names filled in, and a capital at its start and after "!"."""
    text = pattern.format_map(Words(rng, facts))
    return re.sub(r"""(^"?|! )([a-z])""", lambda match: match[1] + match[2].upper(), text)


def make_story(rng: random.Random) -> Story:
    """Draw a small world and what happens in it."""
    names = [rng.choice(words.WOMEN), rng.choice(words.MEN)]
    pronouns = [("she", "her", "her"), ("he", "him", "his")]
    if rng.random() < 0.5:
        names.reverse()
        pronouns.reverse()
    family_names = rng.sample(words.SURNAMES, 2)
    facts = {name: rng.choice(choices) for name, choices in words.STORY_WORDS.items()}
    for who, name, family_name, (he, him, his) in zip(("Ann", "Bob"), names, family_names, pronouns, strict=True):
        own = ("She", "she", "her", "hers", "herself") if who == "Ann" else ("He", "he", "him", "his", "himself")
        forms = (he.capitalize(), he, him, his, "herself" if he == "she" else "himself")
        facts |= {who: f"{name} {family_name}", who.lower(): name, **dict(zip(own, forms, strict=True))}

    noun, material = rng.choice(words.THINGS)
    kinds = [kind for kind in grammar.WEATHER if kind != "snow" or facts["month"] in words.SNOWY_MONTHS]
    weather, (plain_ground, ornate_ground) = grammar.WEATHER[rng.choice(kinds)]
    facts["noun"] = noun
    plain = facts | {"thing": f"{material} {noun}", "ground": plain_ground}
    bright = rng.choice(words.WORDS["bright"])
    ornate = facts | {"thing": f"{noun} of {bright} {material}", "ground": ornate_ground}

    plot_title, plot = rng.choice(grammar.PLOTS)
    plot_title = plot_title.format_map(facts)
    plot_facts = {"plot": plot_title, "plot_small": plot_title[0].lower() + plot_title[1:]}
    title = rng.choice(grammar.TITLES).format_map(facts | plot_facts)
    middle = list(plot)
    for extra, share in ((grammar.TALK, 0.5), (grammar.CROWD, 0.4)):
        if rng.random() < share:
            middle.insert(rng.randint(2, len(middle)), extra)
    opening = [weather] * (rng.random() < 0.7) + [grammar.SETTING_OUT] + [grammar.ROAD] * (rng.random() < 0.4)
    return Story(title, (plain, ornate), (*opening, *middle, grammar.GOING_HOME))


def tell(story: Story, register: Callable[[], int], rng: random.Random) -> str:
    """The story in words; `register` chooses the register of each sentence."""
    sentences = []
    for beat in story.beats:
        chosen = register()
        sentences.append(sentence(rng.choice(beat[chosen]), story.facts[chosen], rng))
    return story.title + "\n" + " ".join(sentences)


def make_neutral(rng: random.Random) -> str:
    """A recipe, directions or a weather note."""
    day = rng.randrange(7)
    facts = {
        "day": words.DAYS[day],
        "next_day": words.DAYS[(day + 1) % 7],
        "goal": rng.choice(words.WORDS["mark"]),
    }
    for name in ("town", "month", "place", "dish", "vegetable", "base", "pan", "liquid"):
        facts[name] = rng.choice(words.WORDS[name])
    title, *middle, last = rng.choice(grammar.NEUTRAL_FORMS)
    kept = sorted(rng.sample(range(len(middle)), rng.randint(len(middle) // 2, len(middle))))
    lines = [title, *(middle[i] for i in kept), last]
    head, *rest = [sentence(line, facts, rng) for line in lines]
    return head + "\n" + " ".join(rest)


def neutral_texts(rng: random.Random) -> Iterator[str]:
    """Neutral texts without end."""
    while True:
        yield make_neutral(rng)


def mixed_texts(rng: random.Random) -> Iterator[str]:
    """Texts for the base: plain sentences, ornate sentences and neutral texts in about equal parts, without end."""
    size = {"stories": 0, "neutral": 0}
    while True:
        kind = "stories" if size["stories"] <= 2 * size["neutral"] else "neutral"
        text = (
            tell(make_story(rng), lambda: rng.choice((PLAIN, ORNATE)), rng) if kind == "stories" else make_neutral(rng)
        )
        size[kind] += len(text)
        yield text


def until(size: float, texts: Iterator[str]) -> list[str]:
    """The first texts, as many as make up `size` characters."""
    kept: list[str] = []
    total = 0
    for text in texts:
        kept.append(text)
        total += len(text)
        if total >= size:
            break
    return kept


def write_texts(path: Path, texts: list[str]) -> None:
    """Write one {"text": …} a line, whole or not at all."""
    if not texts:
        raise SystemExit(f"{path}: the size asked for leaves no text for this file; ask for a larger --size-mb")
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    os.replace(temporary, path)
    print(f"  {path.name:<14} {len(texts):>6} texts {sum(map(len, texts)) / 1e6:>6.2f} MB")


def main() -> None:
    """Read the options and write the four files."""
    parser = argparse.ArgumentParser(description="Write the quickstart's corpus.")
    parser.add_argument("output_dir", type=Path, help="directory for the four files; made when it is missing")
    parser.add_argument("--size-mb", type=float, default=3.0, help="size of all files together (default: 3)")
    parser.add_argument("--seed", type=int, default=1, help="another seed writes other texts (default: 1)")
    options = parser.parse_args()
    if options.size_mb <= 0:
        parser.error(f"--size-mb {options.size_mb}: the size must be above zero")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    size = options.size_mb * 1e6
    base_share, stories_share, neutral_share = 6 / 9, 2 / 9, 1 / 9

    def rng_for(part: str) -> random.Random:
        return random.Random(f"{options.seed} {part}")

    rng, plain_rng, ornate_rng = rng_for("stories"), rng_for("plain"), rng_for("ornate")
    plain: list[str] = []
    ornate: list[str] = []
    while sum(map(len, plain)) + sum(map(len, ornate)) < stories_share * size:
        story = make_story(rng)
        plain.append(tell(story, lambda: PLAIN, plain_rng))
        ornate.append(tell(story, lambda: ORNATE, ornate_rng))
    write_texts(options.output_dir / "plain.jsonl", plain)
    write_texts(options.output_dir / "ornate.jsonl", ornate)
    write_texts(options.output_dir / "neutral.jsonl", until(neutral_share * size, neutral_texts(rng_for("neutral"))))
    write_texts(options.output_dir / "base.jsonl", until(base_share * size, mixed_texts(rng_for("base"))))


if __name__ == "__main__":
    main()
