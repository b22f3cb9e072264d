"""How similar two texts are: the similarity that decides a match, and BLEU, METEOR and CIDEr of matched pairs.

Similarities are cosines, [P, R] for P predicted and R reference texts:

    lexical     our own, of word counts; needs nothing, for development
    sentence    of sentence embeddings (Reimers and Gurevych 2019) from a local model directory; all-mpnet-base-v2 is
                the one ProAssist (arXiv 2506.05904) used, and the only one comparable with its numbers

The similarity decides every dialogue number, so it carries a name, and a number is never shown without it.

BLEU (Papineni et al. 2002) is written out here. METEOR (Denkowski and Lavie 2014) and CIDEr (Vedantam et al. 2015) come
from the package pycocoevalcap (requirements-eval.txt); METEOR also needs Java. What is missing is reported as absent,
with the reason. Nothing is ever downloaded.
"""

import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from prospect.errors import ProspectError

INSTALL = "pip install -r requirements-eval.txt"


def words(text: str) -> list[str]:
    """Lower-case words without punctuation: "Don't stop, now!" -> don, 't, stop, now."""
    return re.findall(r"'?\w+", text.lower().replace("\u2019", "'"))


# ---- similarity ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Similarity:
    """A named measure: `between(P texts, R texts)` is [P, R], 1.0 for the same text (a model: up to rounding)."""

    name: str
    between: Callable[[Sequence[str], Sequence[str]], np.ndarray]


def lexical_similarity(predicted: Sequence[str], reference: Sequence[str]) -> np.ndarray:
    """[P, R] cosine of the counts of words and of pairs of neighbouring words; texts of the same words are exactly 1.0.

    "screw the wheel"    screw, the, wheel, screw the, the wheel    5 counts
    "screw the roof"     screw, the, roof,  screw the, the roof     3 in common: 3 / sqrt(5 * 5) = 0.6
    """

    def features(text: str) -> Counter:
        tokens = words(text) or [text]  # "?!" has no words: it equals only itself
        return Counter(tokens) + Counter(zip(tokens, tokens[1:]))

    predicted_counts, reference_counts = [features(text) for text in predicted], [features(text) for text in reference]
    vocabulary = dict.fromkeys(feature for counts in predicted_counts + reference_counts for feature in counts)
    column = {feature: i for i, feature in enumerate(vocabulary)}

    def vectors(all_counts: list[Counter]) -> np.ndarray:
        table = np.zeros((len(all_counts), len(column)))
        for row, counts in enumerate(all_counts):
            table[row, [column[feature] for feature in counts]] = list(counts.values())
        return table

    p, r = vectors(predicted_counts), vectors(reference_counts)  # [P, features], [R, features]
    # Squared lengths are whole numbers and are multiplied before the root is taken: for equal texts it is exact.
    return p @ r.T / np.sqrt((p * p).sum(1)[:, None] * (r * r).sum(1)[None, :])  # [P, R]


def sentence_similarity(model_dir: str | Path) -> Similarity:
    """Cosine of sentence embeddings by the sentence-transformers model in the local directory `model_dir`.

    It is named by the directory. Raises ProspectError where the directory is no model or the package is absent.
    """
    model_dir = Path(model_dir)
    if not (model_dir / "modules.json").is_file():
        raise ProspectError(
            "not a sentence-transformers model directory",
            where=str(model_dir),
            remedy='name the local directory of the model (it holds modules.json), or "lexical"',
        )
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ProspectError(
            "sentence similarity needs the package sentence-transformers", where=str(model_dir), remedy=INSTALL
        ) from error
    try:
        model = SentenceTransformer(str(model_dir), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ProspectError(f"the model cannot be read: {error}", where=str(model_dir)) from error

    def between(predicted: Sequence[str], reference: Sequence[str]) -> np.ndarray:
        if not predicted or not reference:
            return np.zeros((len(predicted), len(reference)))
        texts = list(dict.fromkeys([*predicted, *reference]))  # each text once
        vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)  # [texts, width]
        row = {text: i for i, text in enumerate(texts)}
        p, r = vectors[[row[text] for text in predicted]], vectors[[row[text] for text in reference]]
        return p @ r.T

    return Similarity(model_dir.resolve().name, between)


def load_similarity(which: str) -> Similarity:
    """`"lexical"`, or the local directory of a sentence-transformers model."""
    return Similarity("lexical", lexical_similarity) if which == "lexical" else sentence_similarity(which)


# ---- BLEU, METEOR, CIDEr -------------------------------------------------------------------------


@dataclass(frozen=True)
class TextScores:
    """`scores` by name, BLEU and METEOR in 0..1, CIDEr in 0..10; `absent` says why a metric was not computed."""

    scores: dict[str, float]
    absent: dict[str, str] = field(default_factory=dict)


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]], max_order: int = 4) -> list[float]:
    """Corpus BLEU-1 .. BLEU-max_order of hypotheses, each against its own one or several references.

    BLEU-N = brevity penalty * geometric mean over n <= N of (clipped n-gram hits / n-grams written), counts summed over
    the corpus, unsmoothed. The reference length of a sentence is that of the reference closest in length, the shorter
    on a tie. An empty corpus is 0.0.
    """
    hits, written = np.zeros(max_order), np.zeros(max_order)
    hypothesis_length = reference_length = 0
    for hypothesis, alternatives in zip(hypotheses, references, strict=True):
        tokens, reference_tokens = words(hypothesis), [words(text) for text in alternatives]
        hypothesis_length += len(tokens)
        reference_length += min((len(r) for r in reference_tokens), key=lambda n: (abs(n - len(tokens)), n))
        for order in range(1, max_order + 1):
            allowed = Counter()  # an n-gram counts as often as in the reference that has it most often
            for reference in reference_tokens:
                allowed |= _ngrams(reference, order)
            mine = _ngrams(tokens, order)
            hits[order - 1] += (mine & allowed).total()
            written[order - 1] += mine.total()
    if hypothesis_length == 0:
        return [0.0] * max_order
    brevity = min(1.0, math.exp(1 - reference_length / hypothesis_length))
    scores = []
    for order in range(1, max_order + 1):
        precisions = [h / w if w else 0.0 for h, w in zip(hits[:order], written[:order])]
        mean_log = sum(math.log(p) for p in precisions) / order if all(precisions) else -math.inf
        scores.append(brevity * math.exp(mean_log))
    return scores


def _ngrams(tokens: list[str], order: int) -> Counter:
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def text_metrics(hypotheses: Sequence[str], references: Sequence[str]) -> TextScores:
    """BLEU-1..4, METEOR and CIDEr of correct pairs: hypothesis i was matched to reference i. No pair: 0.0 everywhere.

    All three see the same lower-case words. CIDEr weighs words by how rare they are among these very references: it is
    0 for a single pair and grows with their variety. Compare it only between systems on the same data.
    """
    scores = {f"BLEU-{n}": score for n, score in enumerate(bleu(hypotheses, [[text] for text in references]), start=1)}
    absent = {}
    theirs = {i: [" ".join(words(text))] for i, text in enumerate(references)}
    ours = {i: [" ".join(words(text))] for i, text in enumerate(hypotheses)}
    for name, score in (("METEOR", _meteor), ("CIDEr", _cider)):
        try:
            scores[name] = score(theirs, ours)
        except _Absent as reason:
            absent[name] = str(reason)
    return TextScores(scores, absent)


def weighted_by_jaccard(scores: dict[str, float], jaccard_index: float) -> dict[str, float]:
    """`X_w` = jaccard_index * X: text quality, reduced by what was missed or redundant."""
    return {f"{name}_w": jaccard_index * score for name, score in scores.items()}


class _Absent(Exception):
    """Why an optional metric cannot be computed here."""


def _meteor(references: dict[int, list[str]], hypotheses: dict[int, list[str]]) -> float:
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError as error:
        raise _Absent(f"needs the package pycocoevalcap: {INSTALL}") from error
    if shutil.which("java") is None:
        raise _Absent("needs Java: no `java` on the path")
    if not hypotheses:
        return 0.0
    try:
        score, _ = Meteor().compute_score(references, hypotheses)
    except (OSError, ValueError) as error:  # Java itself failed: its answer is not a number, or its pipe is closed
        raise _Absent(f"the METEOR program failed: {error}") from error
    return float(score)


def _cider(references: dict[int, list[str]], hypotheses: dict[int, list[str]]) -> float:
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise _Absent(f"needs the package pycocoevalcap: {INSTALL}") from error
    return float(Cider().compute_score(references, hypotheses)[0]) if hypotheses else 0.0
