"""How much better the chosen answer is, as the paper's four ratings (Llama 2, section 3.2.1), from each set's own measure.

| rating               | HelpSteer2/3 preference | HelpSteer2 helpfulness | UltraFeedback fine-grained | UltraFeedback overall |
|----------------------|-------------------------|------------------------|----------------------------|-----------------------|
| significantly_better | 3 (much better)         | apart by 3 or 4 of 4   | apart by 2 or more of 4    | apart by 4 or more of 9 |
| better               | 2 (better)              | apart by 2             | by 1 or more               | by 2 or more          |
| slightly_better      | 1 (slightly better)     | apart by 1             | by 0.5 or more             | by 1 or more          |
| negligibly_better    |                         |                        | by less                    | by less               |
| no pair              | 0 (about the same)      | equal                  | equal                      | equal                 |

The first column is the sets' own words (cards of nvidia/HelpSteer2 and nvidia/HelpSteer3), the others are ours. Equal
answers give no pair: which of the two would be the chosen one is not told. Rows so left out are counted by the reader.
Ranks of OASST are read in `llamachat.data.sources.oasst`; PKU-SafeRLHF, BeaverTails and hh-rlhf grade nothing.
"""

from collections.abc import Iterator, Sequence

from llamachat.data.sources.source import Record, message

Steps = tuple[float, float, float]  # the least difference for slightly_better, better, significantly_better

STRENGTH: Steps = (1, 2, 3)  # HelpSteer2 and HelpSteer3, and the difference of two grades of HelpSteer2
FINE_GRAINED: Steps = (0.5, 1, 2)  # UltraFeedback: means of four grades from 1 to 5
OVERALL: Steps = (1, 2, 4)  # UltraFeedback: one grade from 1 to 10


def rating_of_difference(difference: float, steps: Steps) -> str:
    """The rating of a pair whose answers lie so far apart."""
    assert difference > 0, "the chosen answer is the better one"
    ratings = ("negligibly_better", "slightly_better", "better", "significantly_better")
    return ratings[sum(difference >= step for step in steps)]


def graded_pair(
    prompt: Sequence[dict[str, str]], answers: tuple[str, str], difference: float, steps: Steps
) -> Iterator[Record]:
    """The pair whose second answer is better by `difference` (negative: the first is); none where they are equal."""
    if not difference:
        return
    rejected, chosen = answers if difference > 0 else answers[::-1]
    yield {
        "prompt": list(prompt),
        "chosen": [message("assistant", chosen)],
        "rejected": [message("assistant", rejected)],
        "rating": rating_of_difference(abs(difference), steps),
    }
