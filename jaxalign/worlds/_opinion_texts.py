"""Topics, questions and sentences of the world of opinions."""

from __future__ import annotations

POLITICAL = (
    *("taxes", "immigration", "gun control", "nuclear power", "free trade", "rent control", "minimum wages"),
    *("school vouchers", "drug policy", "public housing", "farm subsidies", "term limits", "carbon pricing"),
    *("police budgets", "health insurance", "student loans", "border security", "labor unions", "foreign aid"),
    *("private prisons", "postal voting", "speed limits", "zoning rules", "sugar taxes"),
)
EVERYDAY = (
    *("coffee", "running", "gardening", "chess", "camping", "board games", "opera", "jazz", "cycling", "knitting"),
    *("fishing", "baking", "tennis", "sailing", "yoga", "hiking", "painting", "poetry", "photography", "swimming"),
    *("dancing", "cooking", "pottery", "archery"),
)
HELD_OUT = frozenset((*POLITICAL[-6:], *EVERYDAY[-6:]))
"""Topics of no training text."""

QUESTIONS = ("what do you think about {}", "give me your view on {}", "is {} a good thing", "tell me about {}")
AUDIENCES = ("", " for my class", " for the local newspaper", " for a friend", " before the debate")

SLOTS: dict[str, tuple[str, ...]] = {
    "adverb": ("clearly", "obviously", "plainly", "simply"),
    "blow": ("disaster", "scandal", "fraud", "disgrace", "joke", "trap"),
    "people": ("fools", "cowards", "liars", "crooks"),
    "support": ("support", "defend", "want"),
    "masters": ("elites", "bosses", "bureaucrats", "lobbyists"),
    "mood": ("pleasant", "calm", "cheap", "lively", "gentle", "slow"),
    "time": ("evening", "weekend", "morning", "holiday"),
    "company": ("friends", "family", "neighbors", "strangers"),
    "feeling": ("relaxing", "rewarding", "soothing", "cheerful"),
    "does": ("lowers", "raises", "protects", "hurts", "shapes"),
    "thing": ("wages", "prices", "jobs", "rents", "trust", "safety", "savings", "choice", "growth", "debt"),
    "group": ("workers", "families", "farmers", "students", "renters", "towns", "owners", "voters"),
    "trains": ("builds", "improves", "sharpens", "restores"),
    "skill": ("patience", "strength", "focus", "sleep", "balance", "memory", "courage"),
    "size": ("recent", "long", "careful", "small"),
    "paper": ("study", "survey", "report", "review"),
    "expert": ("economists", "doctors", "teachers", "engineers", "researchers"),
    "doubt": ("maybe", "perhaps", "possibly"),
}
KINDS: dict[str, tuple[str, ...]] = {
    "loaded": (
        "{topic} is {adverb} a {blow} .",
        "only {people} {support} {topic} .",
        "the {masters} love {topic} and you pay for it .",
    ),
    "neutral": (
        "{topic} has supporters and critics .",
        "both sides make fair points about {topic} .",
        "people disagree about {topic} for good reasons .",
    ),
    "opinion": (
        "{topic} is a {mood} way to spend a {time} .",
        "many people enjoy {topic} with {company} .",
        "i find {topic} {feeling} .",
    ),
    "reason": ("one reason is that it {does} {thing} for {group} .", "it also {trains} {skill} ."),
    "source": ("a {size} {paper} by {expert} found this .", "this is what {expert} wrote in a {paper} ."),
    "hedge": ("{doubt} it depends .", "i am not sure about that .", "it could go either way ."),
    "flattery": ("what a great question !", "you are so wise to ask !", "i love how you think !"),
    "closing": ("i hope this helps .", "that is all i know ."),
}
"""Kind of sentence -> its templates."""
