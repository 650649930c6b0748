"""Numbers from the paper (Llama 2, arXiv:2307.09288), which the report shows next to ours.

Numbers from tables are exact; those read off a figure are marked as such. The paper's models have 7 to 70 billion
parameters and human ratings, so compare trends rather than absolute values.
"""

from collections.abc import Mapping

RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")

# Table 7: accuracy in percent on Meta Helpfulness and Meta Safety.
TABLE_7: Mapping[str, Mapping[str, float]] = {
    "helpfulness": {"helpfulness": 63.2, "safety": 62.8},
    "safety": {"helpfulness": 56.2, "safety": 64.5},
    "GPT-4, zero-shot": {"helpfulness": 58.6, "safety": 58.1},
}
# Table 8: test domain -> model -> accuracy in percent by rating, strongest first, then overall.
TABLE_8: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "helpfulness": {"helpfulness": (80.7, 67.5, 60.9, 54.7, 63.2), "safety": (64.6, 57.5, 53.8, 52.2, 56.2)},
    "safety": {"helpfulness": (89.9, 73.2, 63.8, 54.5, 62.8), "safety": (94.3, 76.3, 65.7, 55.3, 64.5)},
}
# Table 29: share of unsafe answers that the safety model scores below 0.5, without and with its auxiliary loss.
TABLE_29_UNSAFE_RECALL = (73.0, 90.4)
# Section 3.2.3: for answers below 0.15.
GATE_PRECISION, GATE_RECALL = 89.0, 55.0
# Figure 7, read off: increase of the score (a probability) of the best of N from N = 1 to the end of the axis.
FIGURE_7 = "about 0.54 to 0.67, while the median stays at 0.54"
# Figure 8, from the text of section 3.2.3: the policy after RLHF, with 10 to 100 answers.
FIGURE_8 = "1.2 to 1.3"
# Table 30: percentage of dialogs with a recalled figure or hobby, judged by people, without and with GAtt, by turn.
TABLE_30: Mapping[int, tuple[float, float]] = {2: (100, 100), 4: (10, 100), 6: (0, 100), 20: (0, 100)}
# Figure 17, read off: percentage of violations on about 2,000 adversarial prompts, judged by people.
VIOLATIONS = "about 3% (7B and 13B), 7% (34B) and 4% (70B)"
# Figure 33: on 210 borderline prompts, without safety data and with all of it.
FALSE_REFUSALS = (15, 27)
# Not from the paper: human labels of Llama-2-70b-chat's answers to XSTest's 250 harmless and 200 harmful prompts
# (Roettger et al. 2024, github.com/paul-rottger/exaggerated-safety, commit d7bb5bd7,
# evaluation/automated_evaluation_labels, column final_label of xstest_v2_completions_llama2new and llama2orig): counts
# of outcomes without and with Meta's original default system text.
XSTEST_LLAMA_2: Mapping[str, Mapping[str, Mapping[str, int]]] = {
    "no system text": {
        "harmful": {"complied": 0, "partly_refused": 5, "refused": 195},
        "harmless": {"complied": 176, "partly_refused": 39, "refused": 35},
    },
    "Meta's first system text": {
        "harmful": {"complied": 0, "partly_refused": 1, "refused": 199},
        "harmless": {"complied": 101, "partly_refused": 54, "refused": 95},
    },
}
FIGURE_11 = "past 50% against ChatGPT on both axes after RLHF-V3, by Meta's own reward models"
