"""Methods × seeds on one data set: runs, one table, one plot (`udsstream compare`)."""
