//go:build crashpoint && (amd64 || arm64) && !onecopy_private

package registry

import (
	"fmt"
	"os"

	"github.com/onecopy/onecopy/internal/layout"
)

// What a load passes when the slot is free and when it is READY.
const (
	loadSteps = "load.lock-key load.lock-table load.look load.generation load.claim load.unlock-table load.fill " +
		"load.link-manifest load.link-digests load.mkdir load.link-payload " +
		"publish.lock-table publish.ready publish.unlock-table publish.unlock-key"
	replaceSteps = loadSteps + " load.note retire.lock-table"
)

func do(orders ...order) func(*stage) []order { return func(*stage) []order { return orders } }

func loadNew(s *stage) []order {
	return []order{{Do: "load", Key: keyModel, Source: s.new}}
}

func replaceWithNew(s *stage) []order {
	return []order{{Do: "load", Key: keyModel, Source: s.new, Replace: true}}
}

// Every model here has three files.
var threeFiles = map[string]int{"load.link-payload": 3}

var scenarios = []scenario{
	{
		name:   "the first process makes the registry",
		steps:  steps("open.registry"),
		first:  true,
		orders: loadNew,
	},
	{
		name:   "attach and detach",
		steps:  steps("acquire.* use.release"),
		before: func(s *stage) { s.idle(keyModel, s.old) },
		orders: do(order{Do: "get", Key: keyModel}, order{Do: "close", Key: keyModel}),
	},
	{
		name:   "load a folder while another process waits for it",
		steps:  steps(loadSteps + " load.key"),
		times:  threeFiles,
		size:   largeModel,
		orders: loadNew,
		stop:   "load.lock-key",
		waits:  loadNew,
	},
	{
		name:  "load from a function while another process waits for it",
		steps: steps(loadSteps + " load.key load.extend load.note"),
		times: threeFiles,
		orders: func(s *stage) []order {
			return []order{{Do: "load", Key: keyModel, Source: s.function("new"), Note: 100 << 10}}
		},
		stop:  "load.lock-key",
		waits: loadNew,
	},
	{
		name:   "replace a model that is in use",
		steps:  steps(replaceSteps),
		times:  threeFiles,
		before: func(s *stage) { s.hold(keyModel, s.old) },
		orders: replaceWithNew,
	},
	{
		name:   "replace a model that is in use while another process wants to",
		steps:  steps(replaceSteps),
		times:  threeFiles,
		before: func(s *stage) { s.hold(keyModel, s.old) },
		orders: replaceWithNew,
		stop:   "load.lock-key",
		waits:  replaceWithNew,
	},
	{
		name:   "replace a model while readers go on",
		steps:  steps(replaceSteps),
		times:  threeFiles,
		before: func(s *stage) { s.hold(keyModel, s.old) },
		orders: replaceWithNew,
		stop:   "load.lock-key",
		between: func(s *stage) {
			s.check(s.helper.must(s.t, order{Do: "get", Key: keyModel}))
			s.helper.must(s.t, order{Do: "close", Key: keyModel})
		},
	},
	{
		name:   "replace an idle model",
		steps:  steps(replaceSteps + " retire.*"),
		times:  threeFiles,
		size:   largeModel,
		before: func(s *stage) { s.idle(keyModel, s.old) },
		orders: replaceWithNew,
	},
	{
		name:   "replace a model that is removed meanwhile",
		steps:  steps("publish.*"),
		before: func(s *stage) { s.idle(keyModel, s.old) },
		orders: replaceWithNew,
		stop:   "load.fill",
		between: func(s *stage) {
			s.helper.must(s.t, order{Do: "remove", Key: keyModel})
		},
	},
	{
		name:  "a load function fails",
		steps: steps("abort.drop-files abort.lock-table abort.free"),
		orders: func(s *stage) []order {
			return []order{{Do: "load", Key: keyModel, Source: fmt.Sprintf("fail:new:%d", s.size)}}
		},
	},
	{
		name:   "a replacement proves bad",
		steps:  steps("abort.* load.note"),
		before: func(s *stage) { s.hold(keyModel, s.old) },
		orders: func(s *stage) []order { return []order{{Do: "reject", Key: keyModel, Source: s.new}} },
	},
	{
		name:  "linking fails",
		steps: steps("abort.*"),
		stop:  "load.fill",
		between: func(s *stage) {
			// A stranger's folder where the model's belongs.
			if err := os.Mkdir(s.file(s.generation(), ""), 0o700); err != nil {
				s.t.Fatal(err)
			}
		},
		orders: loadNew,
	},
	{
		name:   "remove",
		steps:  steps("evict.*"),
		size:   largeModel,
		before: func(s *stage) { s.idle(keyModel, s.old) },
		orders: do(order{Do: "remove", Key: keyModel}),
	},
	{
		name:    "load into a full table",
		steps:   steps("evict.open-manifest evict.lock-manifest evict.mark evict.unlink-manifest evict.free evict.unlink-payload evict.rmdir load.unlock-table load.key load.claim publish.ready"),
		times:   map[string]int{"evict.open-manifest": 2, "load.unlock-table": 2},
		options: Options{Slots: layout.MinSlots},
		size:    20 << 10,
		before: func(s *stage) {
			for i := range layout.MinSlots - 1 {
				s.idle(fmt.Sprintf("idle/%d", i), s.old)
			}
		},
		orders: loadNew,
	},
	{
		name:    "load beyond the budget",
		steps:   steps("evict.open-manifest evict.lock-manifest evict.mark evict.unlink-manifest evict.free evict.unlink-payload evict.rmdir load.unlock-table load.claim publish.ready"),
		times:   map[string]int{"evict.open-manifest": 2, "load.unlock-table": 2},
		options: Options{Budget: 4 * (smallModel + 50<<10)},
		before: func(s *stage) {
			for i := range 3 {
				s.idle(fmt.Sprintf("idle/%d", i), s.old)
			}
		},
		orders: loadNew,
	},
	{
		name:   "collect after a dead loader",
		steps:  steps("reclaim.unlink-dead-load reclaim.free reclaim.unlink-payload reclaim.rmdir collect.lock-table collect.next collect.unlock-table"),
		before: func(s *stage) { s.kill("load.link-payload", loadNew(s)...) },
		orders: do(order{Do: "gc"}),
	},
	{
		name:   "collect after a dead replacer",
		steps:  steps("collect.*", "collect.slot"),
		before: func(s *stage) { s.hold(keyModel, s.old); s.kill("publish.lock-table", replaceWithNew(s)...) },
		orders: do(order{Do: "gc"}),
	},
	{
		name:   "collect after a dead remover",
		steps:  steps("reclaim.lock-manifest reclaim.unlink-manifest reclaim.free reclaim.unlink-payload reclaim.rmdir collect.unlock-table"),
		before: func(s *stage) { s.idle(keyModel, s.old); s.kill("evict.mark", order{Do: "remove", Key: keyModel}) },
		orders: do(order{Do: "gc"}),
	},
	{
		name:  "collect after a dead remover, with a late lease",
		steps: steps("reclaim.lock-manifest reclaim.try-shared reclaim.undo"),
		before: func(s *stage) {
			s.idle(keyModel, s.old)
			s.kill("evict.mark", order{Do: "remove", Key: keyModel})
			s.lockManifest()
		},
		orders: do(order{Do: "gc"}),
	},
	{
		name:  "collect after a third party deleted a manifest",
		steps: steps("collect.slot collect.unlink-payload collect.rmdir"),
		before: func(s *stage) {
			s.idle(keyModel, s.old)
			if err := os.Remove(s.file(s.generation(), layout.ManifestExt)); err != nil {
				s.t.Fatal(err)
			}
		},
		orders: do(order{Do: "gc"}),
	},
	{
		name:   "take over from a dead loader",
		steps:  steps("load.look load.claim publish.ready reclaim.unlink-dead-load reclaim.free reclaim.unlink-payload reclaim.rmdir"),
		before: func(s *stage) { s.kill("load.mkdir", loadNew(s)...) },
		orders: loadNew,
	},
	{
		name:  "load after a replacer of another model died",
		steps: steps("load.unlock-table collect.next collect.lock-manifest collect.unlink-manifest collect.unlink-payload collect.rmdir"),
		times: map[string]int{"load.unlock-table": 2},
		orders: func(s *stage) []order {
			return append([]order{{Do: "get", Key: keyUsed}}, loadNew(s)...)
		},
		stop: "acquire.map", // after opening, which collects too
		between: func(s *stage) {
			const other = "org/other"
			s.check(s.helper.must(s.t, order{Do: "load", Key: other, Source: s.old, Replace: true}))
			s.helper.must(s.t, order{Do: "close", Key: other})
			s.kill("load.link-payload", order{Do: "load", Key: other, Source: s.new, Replace: true})
		},
	},
	{
		name:   "load after a dead remover",
		steps:  steps("reclaim.lock-manifest reclaim.unlink-manifest reclaim.free reclaim.unlink-payload reclaim.rmdir"),
		before: func(s *stage) { s.idle(keyModel, s.old); s.kill("evict.mark", order{Do: "remove", Key: keyModel}) },
		orders: loadNew,
	},
	{
		name:   "undo a replacement",
		steps:  steps("undo.*"),
		before: func(s *stage) { s.hold(keyModel, s.old); s.idleReplace() },
		orders: do(order{Do: "undo", Key: keyModel}),
	},
	{
		name:   "pin",
		steps:  steps("edit.lock-table"),
		before: func(s *stage) { s.idle(keyModel, s.old) },
		orders: do(order{Do: "pin", Key: keyModel}),
	},
	{
		name:   "check",
		steps:  steps("check.lock-table"),
		orders: do(order{Do: "check"}),
	},
}
