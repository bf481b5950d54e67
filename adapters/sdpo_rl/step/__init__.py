"""One training step: functions of explicit arguments, from the inputs of a micro-batch to its loss and metrics.

`batch` selects the rows that run, `forward` and `head` run both models, `loss` calls the core's losses,
`micro_batch` composes them, `denominator` counts an optimizer step, `metrics` sums over micro-batches.
"""
