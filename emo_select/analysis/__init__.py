"""What the experts know: token clusters, topic coverage, and the numbers that carry the claim (paper §5.3, App. D).

`routing` streams documents through a model and stores what its routers say; `fit` clusters the tokens; `labels` says
in words what a cluster is; `measures` gives numbers with a null and an interval; `coverage` does the same for topics.
`layout` is the contract between them: it names every file.
"""
