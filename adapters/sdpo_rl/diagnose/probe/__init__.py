"""`sdpo_rl.probe`: whether a model can teach itself, measured on generation batches without training.

run        the probe of a trainer
tokens     student and teacher at single tokens: agreement, mass of the support, gradients by alpha
forwards   logits and log-probabilities of both models over the rows of a batch
answers    log-probability of right answers with and without the feedback in the prompt
retry      what the model writes when it sees the feedback
cost       time and memory of a step
verdict    the rules that turn the numbers into words
result     the numbers, and how they print
"""
