"""The distributed loop; controller.py is all of it on one screen, over these parts:

weight_sync.py   which worker holds which version, and how many steps may be made ahead because of it
workers.py       who does the work: dispatch, balance, replacement of the lost
problems.py      a step of problems with one answer each: tickets, groups, refills
window.py        which groups a step takes, where it does not wait for all of its own
episodes.py      a step of multi-turn episodes: replay and critic beside them
batches.py       advantages and collation, for both; evaluation.py: held-out rewards; replay_client.py: rows
samples.py       which completions are kept to be read
batch_queue.py   where the learner finds its step, and when training ends
checkpoints.py   what a run goes back to
supervisor.py    failures, stalls, and what the driver reads
"""
