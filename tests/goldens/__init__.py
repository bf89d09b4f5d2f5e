"""What the pass does with a fixed set of graphs, as text, so that a change of the code that means no other behaviour
can be seen to have none.
"""
