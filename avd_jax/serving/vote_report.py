"""What a blind study came to: Fig. 7's stacked bars, tables, agreement, as a page and as text."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from avd_jax.data import html
from avd_jax.data.html import Html
from avd_jax.evaluation.preferences import (
    LOSS,
    OUTCOMES,
    TIE,
    WIN,
    Comparison,
    Share,
    Vote,
    compare,
    krippendorff_alpha,
    units_of,
)
from avd_jax.serving.votes import COMPARABLE, QUESTIONS, VoteFile

TITLE = "User study"
TITLES = {"quality": "Visual quality", "agreement": "Agreement with the prompt"}
_COLOURS = ("#4477aa", "#8a909a", "#c8505f")
# On a phone the cells of a row stand below each other, with the words of the header before them.
_STYLE = Html(
    "<style>@media (max-width:44rem){.shares :is(table,tbody){display:block} .shares thead,.shares td:empty"
    "{display:none} .shares tr{display:grid;grid-template-columns:repeat(3,1fr);"
    "border-bottom:1px solid var(--line)} .shares td{border:0;padding:.15rem;text-align:left;white-space:normal;"
    "min-width:0;overflow-wrap:anywhere} .shares td:nth-child(4),.shares td:nth-child(8){grid-column:1/-1}"
    ".shares td::before,.shares td:nth-child(4){color:var(--soft);font-size:.87rem}"
    ".shares td:nth-child(2)::after{content:' pairs'} .shares td:nth-child(3)::after{content:' votes'}"
    ".shares td:nth-child(n+5)::before{display:block} .shares td:nth-child(5)::before{content:'first better'}"
    ".shares td:nth-child(6)::before{content:'comparable'} .shares td:nth-child(7)::before{content:'second better'}"
    ".shares td:nth-child(8)::before{display:inline;content:'alpha '}}</style>"
)
EXPLANATION = (
    "Majority: each pair of videos counts once, as what most said of it; answers that are equally frequent count as "
    "comparable; Wilson's intervals of 95 %. Votes: each vote counts; intervals of 95 % by a bootstrap over pairs of "
    "videos. Agreement: Krippendorff's alpha for nominal answers, which is Fleiss' kappa for any number of votes a "
    "pair: 1 is always, 0 no more than by chance; none if no pair has two votes, or all votes are the same."
)


def results(file: VoteFile) -> dict[str, dict[tuple[str, str], Comparison]]:
    """Return question -> pair of methods -> how the first stands to the second."""
    return {question: compare(_votes(file, question), file.study.methods) for question in QUESTIONS}


def results_page(file: VoteFile, *, expected: Collection[str] | None = None, per_pair: int = 1) -> str:
    """Return the page of results.

    Args:
      file: the votes.
      expected: names of the study's pairs, if they are known.
      per_pair: people who should vote on each.
    """
    return html.page_of(TITLE, _pieces(file, expected, per_pair))


def _pieces(file: VoteFile, expected: Collection[str] | None, per_pair: int) -> list[Html]:
    pieces = [_STYLE, html.paragraph(_headline(file, expected, per_pair))]
    for question, comparisons in results(file).items():
        pieces.append(html.heading(TITLES[question]))
        pieces.append(html.paragraph(f"{QUESTIONS[question]} {_overall(file, question)}", soft=True))
        pieces += [_bars(comparisons), _table(comparisons)]
    pieces.append(html.paragraph(EXPLANATION, soft=True))
    return pieces


def write_results(file: VoteFile, path: Path) -> None:
    """Write the page of results (UserError if it cannot be written)."""
    html.write_page(path, TITLE, _pieces(file, None, 1))


def results_text(file: VoteFile) -> str:
    """Return the results as lines for a terminal."""
    lines = [_headline(file, None, 1)]
    for question, comparisons in results(file).items():
        lines += ["", f"{TITLES[question]}. {_overall(file, question)}"]
        lines.append(f"  {'first : second':<32} {'pairs':>5} {'votes':>5}   majority: win, comparable, loss (95 %)")
        for (first, second), found in comparisons.items():
            shares = ", ".join(_shown(found.by_majority[outcome]) for outcome in OUTCOMES)
            lines.append(f"  {f'{first} : {second}':<32} {found.items:>5} {found.votes:>5}   {shares}")
            shares = ", ".join(_shown(found.by_vote[outcome]) for outcome in OUTCOMES)
            lines.append(f"  {'':<32} {'':>5} {'':>5}   votes:    {shares}; alpha {_alpha(found.agreement)}")
    return "\n".join([*lines, "", EXPLANATION])


def _votes(file: VoteFile, question: str) -> list[Vote]:
    outcomes = []
    for line in file.votes():
        answer = getattr(line, question)
        outcome = TIE if answer == COMPARABLE else WIN if answer == line.methods[0] else LOSS
        outcomes.append(Vote(line.pair, tuple(line.methods), outcome))
    return outcomes


def _headline(file: VoteFile, expected: Collection[str] | None, per_pair: int) -> str:
    votes = file.votes()
    counts = Counter(vote.pair for vote in votes)
    people = len({vote.annotator for vote in votes})
    text = f"{len(votes)} votes of {people} people on {len(counts)} pairs of {', '.join(file.study.methods)}."
    if expected is None:
        return f"{text} A pair has {min(counts.values())} votes at least." if counts else text
    complete = sum(counts[pair] >= per_pair for pair in expected)
    return f"{text} {complete} of {len(expected)} pairs have {per_pair} votes or more."


def _overall(file: VoteFile, question: str) -> str:
    units = units_of(_votes(file, question), file.study.methods)
    alpha = krippendorff_alpha(votes for items in units.values() for votes in items.values())
    return f"Agreement between people: alpha {_alpha(alpha)}."


def _alpha(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _shown(share: Share) -> str:
    return f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"


def _bars(comparisons: Mapping[tuple[str, str], Comparison]) -> Html:
    """The majorities of each pair of methods."""
    if not comparisons:
        return html.paragraph("No votes yet.")
    return html.stacked_bars(
        [
            html.Bar(
                (f"{first} better", COMPARABLE, f"{second} better"),
                [found.by_majority[outcome].value for outcome in OUTCOMES],
                _COLOURS,
            )
            for (first, second), found in comparisons.items()
        ]
    )


def _table(comparisons: Mapping[tuple[str, str], Comparison]) -> Html:
    header = ("first : second", "pairs", "votes", "", "first better", "comparable", "second better", "alpha")
    rows = []
    for (first, second), found in comparisons.items():
        counted = (f"{first} : {second}", str(found.items), str(found.votes))
        rows.append([*counted, "majority", *(_shown(found.by_majority[o]) for o in OUTCOMES), _alpha(found.agreement)])
        rows.append(["", "", "", "votes", *(_shown(found.by_vote[o]) for o in OUTCOMES), ""])
    return Html(f'<div class="shares">{html.table(header, rows)}</div>') if rows else Html("")
