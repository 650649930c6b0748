"""The paper's own numbers (Llama 2, arXiv:2307.09288), as the report shows them next to ours.

Those of tables are exact; those that are read off a figure are marked as such. The paper's models have 7 to 70 billion
parameters and its ratings come from people, so a comparison is one of shape, seldom of height.
"""

from collections.abc import Mapping

RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")

# Table 7: accuracy in percent on Meta Helpfulness and Meta Safety.
TABLE_7: Mapping[str, Mapping[str, float]] = {
    "helpfulness": {"helpfulness": 63.2, "safety": 62.8},
    "safety": {"helpfulness": 56.2, "safety": 64.5},
    "GPT-4, zero-shot": {"helpfulness": 58.6, "safety": 58.1},
}
# Table 8: test domain -> model -> accuracy in percent by rating, strongest first, then all.
TABLE_8: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "helpfulness": {"helpfulness": (80.7, 67.5, 60.9, 54.7, 63.2), "safety": (64.6, 57.5, 53.8, 52.2, 56.2)},
    "safety": {"helpfulness": (89.9, 73.2, 63.8, 54.5, 62.8), "safety": (94.3, 76.3, 65.7, 55.3, 64.5)},
}
# Table 29: share of the unsafe answers that the safety model puts under 0.5, without and with its auxiliary loss.
TABLE_29_UNSAFE_RECALL = (73.0, 90.4)
# Section 3.2.3: of answers under 0.15.
GATE_PRECISION, GATE_RECALL = 89.0, 55.0
# Figure 7, read off: the score (a probability) of the best of N grows so from N = 1 to the end of the axis.
FIGURE_7 = "about 0.54 to 0.67, while the median stays at 0.54"
# Figure 8, by the text of section 3.2.3: of the policy after RLHF, with 10 to 100 answers.
FIGURE_8 = "1.2 to 1.3"
# Table 30: share of dialogs in percent whose figure or hobby is recalled, by people; without and with GAtt, by turn.
TABLE_30: Mapping[int, tuple[float, float]] = {2: (100, 100), 4: (10, 100), 6: (0, 100), 20: (0, 100)}
# Figure 17, read off: violations in percent of about 2,000 adversarial prompts, by people.
VIOLATIONS = "about 3% (7B and 13B), 7% (34B) and 4% (70B)"
# Figure 33: of 210 borderline prompts, without safety data and with all of it.
FALSE_REFUSALS = (15, 27)
# Not of the paper: how people labelled Llama-2-70b-chat's answers to XSTest's 250 harmless and 200 harmful prompts (Roettger
# et al. 2024, github.com/paul-rottger/exaggerated-safety, commit d7bb5bd7, evaluation/automated_evaluation_labels, the
# column final_label of xstest_v2_completions_llama2new and llama2orig): counts of outcomes, without Meta's first default
# system text and with it.
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
