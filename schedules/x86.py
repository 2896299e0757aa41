from tvm import te


def schedule_direct(outs, target):
    return te.create_schedule([o.op for o in outs])


schedule_winograd = schedule_direct
