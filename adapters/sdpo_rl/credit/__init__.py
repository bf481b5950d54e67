"""The credit report: chosen rows of a run with what both models say of each token, and the run's curves.

`recorder` chooses the rows while a run trains and `tokens` computes them; `files` writes and reads them and the
log; `run`, `curves` and `report` make one HTML page of a run's folder, without torch.
"""
