"""The distributed loop; controller.py shows all of it on one screen. Its parts:

weight_sync.py   which worker holds which version, and therefore how many steps may be generated ahead
workers.py       who does the work: dispatch, balance, replacement of lost workers
problems.py      a step of problems with one answer each: tickets, groups, refills
window.py        which groups a step trains on if it does not wait for all of its own
episodes.py      a step of multi-turn episodes, with replay and critic
batches.py       advantages and collation, for both; evaluation.py: held-out rewards; replay_client.py: replay's rows
samples.py       which completions are kept for people to read
batch_queue.py   where the learner gets its batches, and when training ends
checkpoints.py   the states that a run can return to
supervisor.py    failures, stalls, and events for the driver
"""
