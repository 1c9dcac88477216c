"""`kassa bench brokers`: measures the brokers that somebody has, through Kassa's own binders, and says which to choose.

model.py     what is measured, as data      needs.py   needs and measurements -> words (pure)
run.py       one broker after the other, each in a process of its own (part.py)
measure.py   throughput and latency         faults.py  kill -9, and what became of the messages
page.py      the page, charts.py its charts
"""
