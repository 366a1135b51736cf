"""`ngrpo eval`: a model beside its base on the same prompts and noise, as in the paper's Table 1.

Pictures are generated into a directory, then scored one reward at a time, so that neither step holds the other's
weights. Both steps keep what they have done and go on from there. Existing pictures need only the second step.
"""
