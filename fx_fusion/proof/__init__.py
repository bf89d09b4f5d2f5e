"""Does a region compute what a reference computes?"""
