"""Reading compiled programs: collectives and memory traffic of texts as XLA writes them, counted by hand."""

import re

import pytest

from tpaw_jax.planning import hlo

LOOPS = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%condition.1 (p: (s32[], f32[8,128])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %constant.9 = s32[]{:T(128)} constant(32)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %constant.9), direction=LT
}

%condition.2 (p: (s32[], s32[])) -> pred[] {
  %p.2 = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%p.2), index=0
  %count = s32[] get-tuple-element(%p.2), index=1
  ROOT %less.2 = pred[] compare(%j, %count), direction=LT
}

%body.2 (p: (s32[], s32[])) -> (s32[], s32[]) {
  %p.3 = (s32[], s32[]) parameter(0)
  %value = f32[4,128]{1,0:T(4,128)} constant({...})
  %all-reduce.7 = f32[4,128]{1,0:T(4,128)} all-reduce(%value), channel_id=7, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  ROOT %tuple.3 = (s32[], s32[]) tuple(%p.3)
}

%start (x: bf16[1,128]) -> bf16[1,512] {
  %x = bf16[1,128]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[1,512]{1,0:T(8,128)S(1)} all-gather(%x), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={1}, frontend_attributes={chain_id="5"}
}

%part (x: bf16[1,128], y: f32[8,128]) -> f32[8,128] {
  %x.2 = bf16[1,128]{1,0} parameter(0)
  %y.2 = f32[8,128]{1,0} parameter(1)
  %all-gather.2 = bf16[1,512]{1,0:T(8,128)} all-gather(%x.2), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={1}, frontend_attributes={chain_id="5"}
  ROOT %double = f32[8,128]{1,0} add(%y.2, %y.2)
}

%all-reduce-scatter.4 (z: f32[64,128]) -> f32[16,128] {
  %z = f32[64,128]{1,0} parameter(0)
  %all-reduce.5 = f32[64,128]{1,0} all-reduce(%z), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = f32[16,128]{1,0} dynamic-slice(%all-reduce.5), dynamic_slice_sizes={16,128}
}

%body.1 (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p.4 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %w = bf16[1,128]{1,0} constant({...})
  %y.4 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p.4), index=1
  %fusion.1 = bf16[1,512]{1,0:T(8,128)S(1)} fusion(%w), kind=kCustom, calls=%start
  %fusion.2 = f32[8,128]{1,0:T(8,128)} fusion(%w, %y.4), kind=kOutput, calls=%part
  %kernel = f32[8,128]{1,0:T(8,128)} custom-call(%fusion.2), custom_call_target="tpu_custom_call", backend_config={"config":{"body":"
}}, metadata={op_name="a kernel whose attributes take two lines"}
  %gradient = f32[64,128]{1,0:T(8,128)} broadcast(%y.4), dimensions={}
  %fusion.3 = f32[16,128]{1,0:T(8,128)} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter.4, frontend_attributes={async_collective_name="fusion-start.1"}
  %count.4 = (s32[], s32[]) constant({...})
  %while.2 = (s32[], s32[]) while(%count.4), condition=%condition.2, body=%body.2
  ROOT %tuple.4 = (s32[]{:T(128)}, /*index=1*/f32[8,128]{1,0:T(8,128)}) tuple(%p.4, %kernel)
}

ENTRY %main (state: f32[8,128]) -> f32[8,128] {
  %state = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(0)
  %tuple.5 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %state)
  %while.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%tuple.5), condition=%condition.1, body=%body.1
  %last = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
  %exchange = f32[8,128]{1,0:T(8,128)} all-to-all(%last), channel_id=9, replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}
  ROOT %loss = f32[8,128]{1,0:T(8,128)} all-reduce(%exchange), channel_id=10, replica_groups={}, to_apply=%add
}
"""


def test_collectives_count_as_often_as_their_loops_run_and_chains_once():
    collectives = hlo.parse(LOOPS, [3]).collectives()
    assert len(collectives) == 5
    found = {(c.kind, c.times): c for c in collectives}
    gather = found["all-gather", 32]
    assert (gather.size, gather.group, gather.asynchronous) == (1024, (0, 1, 2, 3), True)
    assert gather.bytes == 32 * 1024
    scatter = found["reduce-scatter", 32]
    assert (scatter.size, scatter.group, scatter.asynchronous) == (64 * 128 * 4, (0, 1, 2, 3), False)  # made so again
    inner = found["all-reduce", 96]  # 32 times 3, which the text does not know
    assert (inner.size, inner.group, inner.asynchronous) == (4 * 128 * 4, (0, 2), False)
    assert found["all-to-all", 1].group == (0, 1)
    assert found["all-reduce", 1].group == ()


def test_a_chain_that_goes_through_a_loop_counts_once():
    """Its start is outside, and a part of it in the body that runs three times."""
    start = "  %count.4 = (s32[], s32[]) constant({...})\n"
    through = LOOPS.replace(
        "  ROOT %tuple.3 =", "  %there = f32[8,128]{1,0} fusion(%value, %value), calls=%part.9\n  ROOT %tuple.3 ="
    )
    through = through.replace(start, f"{start}  %begun = bf16[1,512]{{1,0}} fusion(%w), kind=kCustom, calls=%start.9\n")
    for name in ("start", "part"):
        body = LOOPS[LOOPS.index(f"%{name} (") :].split("\n}\n")[0] + "\n}\n"
        through = through.replace(body, body + "\n" + body.replace(f"%{name} (", f"%{name}.9 (").replace('"5"', '"9"'))
    assert [c.times for c in hlo.parse(through, [3]).collectives() if c.kind == "all-gather"] == [32, 32]


def test_a_loop_of_unknown_length_runs_once_unless_told():
    times = [c.times for c in hlo.parse(LOOPS).collectives() if c.size == 2048]
    assert times == [32]


OFFLOADED = """HloModule offloaded, is_scheduled=true

%gather_of (x: bf16[8,128]) -> bf16[32,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[32,128]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%scatter_of (y: f32[32,128]) -> f32[8,128] {
  %y = f32[32,128]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = f32[8,128]{1,0} reduce-scatter(%y), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%matmul (a: bf16[32,128], b: bf16[128,1]) -> bf16[32,1] {
  %a = bf16[32,128]{1,0} parameter(0)
  %b = bf16[128,1]{1,0} parameter(1)
  ROOT %product = bf16[32,1]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

ENTRY %main (p: bf16[8,128], q: f32[32,128], r: bf16[32,128], s: bf16[128,1]) -> f32[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  %q = f32[32,128]{1,0} parameter(1)
  %r = bf16[32,128]{1,0} parameter(2)
  %s = bf16[128,1]{1,0} parameter(3)
  %gather-start = ((), (), (s32[1]{0:S(2)})) call-start(), async_execution_thread="sparsecore", to_apply=%gather_of
  %gather-update = ((bf16[8,128]{1,0}), bf16[32,128]{1,0}) call-update(%gather-start, %p)
  %product.1 = bf16[32,1]{1,0} fusion(%r, %s), kind=kOutput, calls=%matmul
  %gathered = bf16[32,128]{1,0} call-done(%gather-update)
  %scatter-start = ((), (), (s32[1]{0:S(2)})) call-start(), async_execution_thread="sparsecore", to_apply=%scatter_of
  %product.2 = bf16[32,1]{1,0} fusion(%gathered, %s), kind=kOutput, calls=%matmul
  %scatter-update = ((f32[32,128]{1,0}), f32[8,128]{1,0}) call-update(%scatter-start, %q)
  %small = s32[1]{0} broadcast(%product.2), dimensions={}
  ROOT %scattered = f32[8,128]{1,0} call-done(%scatter-update)
}
"""


@pytest.mark.parametrize("libtpu", ["0.0.50", "0.0.52"])
def test_a_collective_on_the_sparse_cores_overlaps_if_a_matmul_runs_between_its_operands_and_its_end(libtpu):
    text = OFFLOADED
    if libtpu == "0.0.52":
        text = re.sub(r"to_apply=(%\w+)", r'custom_call_target="TODO", called_computations={\1}', text)
        text = text.replace(" call-", " custom-call-")
    program = hlo.parse(text)
    found = {c.kind: c for c in program.collectives()}
    gather, scatter = found["all-gather"], found["reduce-scatter"]
    assert (gather.size, gather.group, gather.times, gather.asynchronous) == (32 * 128 * 2, (0, 1, 2, 3), 1, True)
    assert (scatter.size, scatter.asynchronous) == (32 * 128 * 4, False)  # the matmul is before its operands exist
    products = 2 * (32 * 128 + 128 + 32) * 2
    assert program.traffic() == pytest.approx(gather.bytes + scatter.bytes + products, abs=128)


BETWEEN = """HloModule between_slices

%matmul (a: bf16[32,128], b: bf16[128,1]) -> bf16[32,1] {
  %a = bf16[32,128]{1,0} parameter(0)
  %b = bf16[128,1]{1,0} parameter(1)
  ROOT %product = bf16[32,1]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

ENTRY %main (p: bf16[32,128], q: bf16[128,1], x: f32[8,128], y: f32[16,128]) -> f32[16,128] {
  %p = bf16[32,128]{1,0} parameter(0)
  %q = bf16[128,1]{1,0} parameter(1)
  %x = f32[8,128]{1,0} parameter(2)
  %y = f32[16,128]{1,0} parameter(3)
  %after = token[] after-all()
  %send.1 = (f32[8,128]{1,0}, u32[]{:S(2)}, token[]) send(%x, %after), channel_id=1, frontend_attributes={MEGASCALE="sum.1"}
  %recv.1 = (f32[8,128]{1,0}, u32[]{:S(2)}, token[]) recv(%after), channel_id=2, frontend_attributes={MEGASCALE="sum.1"}
  %send-done.1 = token[] send-done(%send.1), channel_id=1
  %product.1 = bf16[32,1]{1,0} fusion(%p, %q), kind=kOutput, calls=%matmul
  %recv-done.1 = (f32[8,128]{1,0}, token[]) recv-done(%recv.1), channel_id=2
  %send.2 = (f32[16,128]{1,0}, u32[]{:S(2)}, token[]) send(%y, %after), channel_id=3, frontend_attributes={MEGASCALE="sum.2"}
  %recv.2 = (f32[16,128]{1,0}, u32[]{:S(2)}, token[]) recv(%after), channel_id=4, frontend_attributes={MEGASCALE="sum.2"}
  %copied = f32[64,128]{1,0} broadcast(%q), dimensions={}
  %recv-done.2 = (f32[16,128]{1,0}, token[]) recv-done(%recv.2), channel_id=4
  ROOT %received = f32[16,128]{1,0} get-tuple-element(%recv-done.2), index=0
}
""".replace("MEGASCALE", '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous')


def test_an_exchange_between_slices_overlaps_if_a_matmul_runs_until_it_is_received():
    found = {c.size: c for c in hlo.parse(BETWEEN).collectives()}
    assert {c.kind for c in found.values()} == {hlo.BETWEEN_SLICES}
    assert {size: c.asynchronous for size, c in found.items()} == {8 * 128 * 4: True, 16 * 128 * 4: False}


TRAFFIC = """HloModule traffic

%slice_of (stack: f32[4,8,128], i: s32[]) -> f32[8,128] {
  %stack = f32[4,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,8,128]{2,1,0} dynamic-slice(%stack, %i), dynamic_slice_sizes={1,8,128}
  ROOT %view = f32[8,128]{1,0} bitcast(%one)
}

%outer (stack: f32[4,8,128], i: s32[], x: f32[8,128]) -> f32[8,128] {
  %stack.1 = f32[4,8,128]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %x.1 = f32[8,128]{1,0} parameter(2)
  %inner = f32[8,128]{1,0} fusion(%stack.1, %i.1), kind=kLoop, calls=%slice_of
  ROOT %sum = f32[8,128]{1,0} add(%inner, %x.1)
}

%write (stack: f32[4,8,128], i: s32[], x: f32[8,128]) -> f32[4,8,128] {
  %stack.2 = f32[4,8,128]{2,1,0} parameter(0)
  %i.2 = s32[] parameter(1)
  %x.2 = f32[8,128]{1,0} parameter(2)
  %new = f32[1,8,128]{2,1,0} bitcast(%x.2)
  ROOT %written = f32[4,8,128]{2,1,0} dynamic-update-slice(%stack.2, %new, %i.2)
}

ENTRY %main (stack: f32[4,8,128], i: s32[], x: f32[8,128]) -> f32[4,8,128] {
  %stack.3 = f32[4,8,128]{2,1,0} parameter(0)
  %i.3 = s32[]{:S(6)} parameter(1)
  %x.3 = f32[8,128]{1,0} parameter(2)
  %read = f32[8,128]{1,0:T(8,128)S(1)} fusion(%stack.3, %i.3, %x.3), kind=kLoop, calls=%outer
  %back = (f32[8,128]{1,0}, f32[8,128]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%read)
  %there = f32[8,128]{1,0} copy-done(%back)
  ROOT %result = f32[4,8,128]{2,1,0} fusion(%stack.3, %i.3, %there), kind=kLoop, calls=%write
}
"""


def test_a_stack_that_is_retiled_in_place_is_not_read_as_a_whole():
    """On tpu7x, a fusion inside of the one that slices or updates a stack has the stack's tiles changed."""
    block = 8 * 128 * 4
    copy = "%retile (s: f32[4,8,128]) -> f32[4,8,128] {\n  %s = f32[4,8,128]{2,1,0:T(16,128)} parameter(0)\n"
    copy += "  ROOT %copy = f32[4,8,128]{2,1,0:T(8,128)} copy(%s)\n}\n\n%slice_of"
    text = TRAFFIC.replace("%slice_of (", copy + " (", 1)
    for n, use in (("", "dynamic-slice(%stack,"), (".2", "dynamic-update-slice(%stack.2,")):
        tiled = "  %tiled" + n + " = f32[4,8,128]{2,1,0} fusion(%stack" + n + "), kind=kLoop, "
        tiled += "output_to_operand_aliasing={{}: (0, {})}, calls=%retile\n"
        before, after = text.split(use)
        line = before.rindex("\n") + 1
        text = before[:line] + tiled + before[line:] + use.replace("%stack" + n + ",", "%tiled" + n + ",") + after
    assert hlo.parse(text).traffic() == hlo.parse(TRAFFIC).traffic() < 8 * block


def test_traffic_is_of_slices_and_updates_and_not_of_what_stays_on_the_chip():
    block = 8 * 128 * 4
    # reads one slice of the stack and x; copies 1 block to memory; reads it and writes it into the stack
    assert hlo.parse(TRAFFIC).traffic() == (1 + 1) * block + block + 2 * block


def test_what_a_fusion_hands_through_is_not_read():
    through = TRAFFIC.replace("ROOT %sum =", "%sum =").replace(
        "%sum = f32[8,128]{1,0} add(%inner, %x.1)",
        "%sum = f32[8,128]{1,0} add(%inner, %x.1)\n  ROOT %both = (f32[8,128]{1,0}, f32[4,8,128]{2,1,0}) tuple(%sum, %stack.1)",
    )
    through = through.replace(
        "%read = f32[8,128]{1,0:T(8,128)S(1)} fusion",
        "%read = (f32[8,128]{1,0:T(8,128)S(1)}, f32[4,8,128]{2,1,0}) fusion",
    )
    assert through != TRAFFIC
    assert hlo.parse(through).traffic() == hlo.parse(TRAFFIC).traffic()


def test_what_a_fusion_reads_through_a_view_made_by_an_inner_fusion_counts():
    view = """%view_of (x: f32[8,128]) -> f32[8,128] {
  %x.4 = f32[8,128]{1,0} parameter(0)
  ROOT %same = f32[8,128]{1,0} bitcast(%x.4)
}

%outer ("""
    through = TRAFFIC.replace("%outer (", view).replace(
        "ROOT %sum = f32[8,128]{1,0} add(%inner, %x.1)",
        "%seen = f32[8,128]{1,0} fusion(%x.1), kind=kLoop, calls=%view_of\n"
        "  ROOT %sum = f32[8,128]{1,0} add(%inner, %seen)",
    )
    assert "%seen" in through
    assert hlo.parse(through).traffic() == hlo.parse(TRAFFIC).traffic()


def test_traffic_in_a_loop_counts_as_often_as_it_runs():
    block, gradient = 8 * 128 * 4, 64 * 128 * 4
    once = 2 * block + 2 * block + block + gradient  # y read and doubled; the kernel; the broadcast
    once += 1024 + gradient  # what is gathered is written, what is scattered is read
    once += 3 * 2 * 2048  # the sum in the inner loop reads and writes
    assert hlo.parse(LOOPS, [3]).traffic() == 32 * once + 2 * 2 * block


def test_a_text_that_is_no_program_is_told():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("module @jit_step {\n}\n")
