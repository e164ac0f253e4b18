package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/onecopy/onecopy/internal/layout"
)

// directory looks at who may write the registry.
func (x *examination) directory() {
	const check = "directory"
	o, err := x.Lstat(x.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		x.add(Info, check, "there is no registry at "+x.dir+" yet", "The first load makes it.", "shmctl load KEY PATH")
	case err != nil:
		x.add(Warn, check, x.dir+" cannot be looked at: "+err.Error(), "", "")
	case o.Mode&fs.ModeSymlink != 0 || !o.Mode.IsDir():
		x.add(Fail, check, x.dir+" is not a directory", "Somebody may have put it there to be followed; it is refused. Make sure who did before it is removed.", "ls -ld "+quote(x.dir))
	case o.Mode.Perm()&0o022 != 0 && o.Mode&fs.ModeSticky != 0:
		x.add(Fail, check, x.dir+" is for everybody", "A registry is a directory of its own, which nobody else can write.",
			fmt.Sprintf("export ONECOPY_DIR=%s", quote(fmt.Sprintf("%s/onecopy-%d", x.dir, x.UID))))
	case o.Mode.Perm()&0o022 != 0:
		x.add(Fail, check, fmt.Sprintf("%s has mode %#o: others than its owner can write it", x.dir, o.Mode.Perm()),
			"Whoever can write the directory can replace a model. It is refused.", "chmod go-w "+quote(x.dir))
	case o.UID != x.UID && o.UID != 0 && x.UID != 0:
		x.add(Info, check, fmt.Sprintf("%s belongs to uid %d", x.dir, o.UID), "Its models can be attached if this owner is named as trusted, and not loaded.",
			fmt.Sprintf("export ONECOPY_TRUST_OWNER=%d", o.UID))
	default:
		x.ok(check, "%s belongs to uid %d, mode %#o", x.dir, o.UID, o.Mode.Perm())
	}
}

var versionFolder = regexp.MustCompile(`^v[0-9]+$`)

// contents looks for what does not belong into the registry.
func (x *examination) contents() {
	names, err := x.names(x.dir)
	if err != nil {
		return // directory has said so
	}
	var others, foreign []string
	for _, n := range names {
		switch {
		case n == layout.Folder:
		case versionFolder.MatchString(n):
			others = append(others, n)
		default:
			foreign = append(foreign, n)
		}
	}
	known := map[string]func(string) bool{
		"": func(n string) bool { return n == layout.TableFile || n == layout.LocksDir || n == layout.ModelsDir },
		layout.LocksDir: func(n string) bool {
			return n == layout.TableLock || strings.HasPrefix(n, "k-")
		},
		layout.ModelsDir: func(n string) bool { _, _, _, ok := layout.ParseGenName(n); return ok },
	}
	for _, sub := range slices.Sorted(maps.Keys(known)) {
		names, _ := x.names(path.Join(x.dir, layout.Folder, sub))
		for _, n := range names {
			if !known[sub](n) {
				foreign = append(foreign, path.Join(layout.Folder, sub, n))
			}
		}
	}
	before := len(x.findings)
	if len(others) > 0 {
		x.add(Warn, "versions", "other layout versions lie beside "+layout.Folder+": "+strings.Join(others, ", "),
			"Programs with another version of the library share nothing with these: every model may be in memory once for each. "+
				"Bring all programs to one version, then remove the rest.",
			"rm -r "+quote(path.Join(x.dir, others[0])))
	}
	if len(foreign) > 0 {
		list := strings.Join(foreign[:min(3, len(foreign))], ", ")
		if len(foreign) > 3 {
			list += ", ..."
		}
		x.add(Warn, "contents", fmt.Sprintf("%s in %s that nothing here made: %s", plural(len(foreign), "name"), x.dir, list),
			"They take memory that no budget counts, and nothing removes them.", "ls -la "+quote(path.Join(x.dir, foreign[0])))
	}
	if n := x.registry.Problems; n > 0 {
		x.add(Warn, "contents", fmt.Sprintf("check finds %s", plural(n, "problem")),
			"Remains of the dead are removed by gc; what else is wrong is said by check, with its repair.", "shmctl gc && shmctl check")
	}
	if len(x.findings) == before {
		x.ok("contents", "nothing lies in %s that does not belong there", x.dir)
	}
}

// leastDuplicate is what is worth a word.
const leastDuplicate = mib

// loaded is a file of a model of some registry.
type loaded struct {
	registry, key string
	gen           uint64
}

// duplicates looks for the same weights in several registries, of whichever user
// and on whichever tmpfs, or under several keys. It reads manifests, and only
// where it may.
func (x *examination) duplicates() {
	if x.mount.kind != "tmpfs" {
		return
	}
	type content struct {
		digest string
		size   int64
	}
	where := map[content][]loaded{}
	unreadable := 0
	dirs := []string{x.dir}
	add := func(d string) {
		if !slices.Contains(dirs, d) {
			dirs = append(dirs, d)
		}
	}
	parents := []string{path.Dir(x.dir)}
	for _, m := range x.mounts {
		if m.kind == "tmpfs" && !slices.Contains(parents, m.point) {
			parents = append(parents, m.point)
		}
	}
	for _, parent := range parents {
		add(parent) // a mount of its own may be the registry
		names, _ := x.names(parent)
		for _, n := range names {
			add(path.Join(parent, n))
		}
	}
	// A tmpfs may be mounted at several places: a generation is known by the
	// number that its registry drew.
	type generation struct{ epoch, number uint64 }
	seen := map[generation]bool{}
	for _, dir := range dirs {
		models := path.Join(dir, layout.Folder, layout.ModelsDir)
		names, err := x.names(models)
		if err != nil && errors.Is(err, fs.ErrPermission) && strings.HasPrefix(path.Base(dir), "onecopy-") {
			unreadable++
		}
		for _, n := range names {
			if _, _, ext, ok := layout.ParseGenName(n); !ok || ext != layout.ManifestExt {
				continue
			}
			man := x.manifest(path.Join(models, n))
			if man == nil || seen[generation{uint64(man.Epoch), man.Generation}] {
				continue
			}
			seen[generation{uint64(man.Epoch), man.Generation}] = true
			for _, f := range man.Files {
				if f.Size >= leastDuplicate {
					c := content{f.Digest, f.Size}
					where[c] = append(where[c], loaded{dir, man.Key, man.Generation})
				}
			}
		}
	}

	var apart, within int64 // bytes too many
	places, keys := map[string]bool{}, map[string]bool{}
	for c, ls := range where {
		slices.SortFunc(ls, func(a, b loaded) int {
			return cmp.Or(strings.Compare(a.registry, b.registry), strings.Compare(a.key, b.key), cmp.Compare(a.gen, b.gen))
		})
		byRegistry := slices.CompactFunc(slices.Clone(ls), func(a, b loaded) bool { return a.registry == b.registry })
		if len(byRegistry) > 1 {
			apart += int64(len(byRegistry)-1) * c.size
			for _, l := range byRegistry {
				places[l.registry] = true
			}
		}
		// Generations of one key replace each other; several keys do not.
		mine := slices.DeleteFunc(slices.Clone(ls), func(l loaded) bool { return l.registry != x.dir })
		mine = slices.CompactFunc(mine, func(a, b loaded) bool { return a.key == b.key })
		if len(mine) > 1 {
			within += int64(len(mine)-1) * c.size
			for _, l := range mine {
				keys[l.key] = true
			}
		}
	}
	before := len(x.findings)
	if apart > 0 {
		list := slices.Sorted(maps.Keys(places))
		share := list[0]
		uid := 0
		if o, err := x.Lstat(share); err == nil {
			uid = o.UID
		}
		x.add(Warn, "duplicates", fmt.Sprintf("%s of the same weights lie in more than one registry: %s", size(apart), strings.Join(list, ", ")),
			"Every user who loads for themselves has a copy of their own. Let one load, with --mode 0755, and the others read.",
			fmt.Sprintf("export ONECOPY_DIR=%s ONECOPY_TRUST_OWNER=%d", quote(share), uid))
	}
	if within > 0 {
		list := slices.Sorted(maps.Keys(keys))
		x.add(Info, "duplicates", fmt.Sprintf("%s of the same weights are loaded under several keys: %s", size(within), strings.Join(list, ", ")),
			"A key is a copy. Programs that mean the same model should name the same key.", "shmctl rm "+quote(list[len(list)-1]))
	}
	if len(x.findings) == before {
		text := "no weights are loaded twice in the registries that can be read"
		if unreadable > 0 {
			text += "; " + plural(unreadable, "other") + " cannot: run it as root"
		}
		x.ok("duplicates", "%s", text)
	}
}

func (x *examination) manifest(file string) *layout.Manifest {
	if st, err := os.Lstat(x.Root + file); err != nil || !st.Mode().IsRegular() || st.Size() > layout.MaxManifest {
		return nil
	}
	b, err := os.ReadFile(x.Root + file)
	if err != nil {
		return nil
	}
	man, err := layout.DecodeManifest(b)
	if err != nil {
		return nil
	}
	return man
}
