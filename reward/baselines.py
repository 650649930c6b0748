"""What a reward model must beat: word counts under a logistic regression, trained on the same pairs.

The other baseline, "the longer answer wins", needs no training and lives with the figures (`reward.evaluation`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llamachat.data.records import Preference

# A word or a single mark: "?" and "!" tell refusals from answers, so marks count too.
_WORDS = r"(?u)\b\w+\b|[^\w\s]"


@dataclass(frozen=True, slots=True)
class TfidfBaseline:
    """A linear model on the words and pairs of neighbouring words of an answer; it never sees the prompt."""

    vectorizer: Any  # scikit-learn's TfidfVectorizer, whose types are not known
    model: Any  # scikit-learn's LogisticRegression

    def differences(self, pairs: Sequence[Preference]) -> list[float]:
        """Score of chosen less score of rejected, one a pair."""
        if not pairs:
            return []
        return (_gaps(self.vectorizer.transform(_answers(pairs))) @ self.model.coef_[0]).tolist()


def fit_tfidf(pairs: Sequence[Preference]) -> TfidfBaseline | None:
    """Fit on `pairs`, best those of the tested domain alone; None where their answers share no words.

    Bradley-Terry on tfidf(chosen) - tfidf(rejected), which is a logistic regression on that difference with both orders
    of each pair and no intercept. Sublinear counts, words and neighbouring pairs of words, C 1 (scikit-learn's own).
    Answers alone: with the prompt before them, validation pairs of the bundled safety data came out 0.03 lower and those
    of helpfulness the same. A mix with pairs of the other domain costs it 0.02 to 0.04 on test pairs of its own.
    """
    # Loads in two seconds: only where a baseline is measured.
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, token_pattern=_WORDS)
    try:
        gaps = _gaps(vectorizer.fit_transform(_answers(pairs)))
    except ValueError:  # scikit-learn's word for a vocabulary with nothing in it
        return None
    model = LogisticRegression(C=1.0, fit_intercept=False, max_iter=1000)
    model.fit(vstack([gaps, -gaps]), [1] * len(pairs) + [0] * len(pairs))
    return TfidfBaseline(vectorizer, model)


def _answers(pairs: Sequence[Preference]) -> list[str]:
    return [answer.content for pair in pairs for answer in (pair.chosen, pair.rejected)]


def _gaps(rows: Any) -> Any:
    """Sparse [pairs, words]: chosen less rejected, from rows in turn."""
    return rows[0::2] - rows[1::2]
