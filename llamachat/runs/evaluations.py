"""The names under which an evaluation lies in its artifact: what the report and a comparison of two runs read."""

EVALUATION = "evaluation.json"
ANSWERS = "answers"  # a folder with the answers of each policy to the test prompts and their scores, prompt by prompt
