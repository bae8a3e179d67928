CREATE FUNCTION anabranch.capture_who() RETURNS event_trigger LANGUAGE plpgsql
AS $f$
BEGIN
    -- Runs as whoever says a statement, a superuser too, and under their search_path: nothing here may be looked up by it.
    PERFORM pg_catalog.set_config('anabranch.who', current_user::pg_catalog.text, true),
        pg_catalog.set_config('anabranch.path', pg_catalog.current_setting('search_path'), true);
END $f$;
CREATE FUNCTION anabranch.capture() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $f$
DECLARE
    who name := current_setting('anabranch.who', true);
    travels boolean := coalesce(who = ANY (@ROLES@), false);
    context text;
BEGIN
    -- Whoever calls a function of another role's has no say in what that role's DDL does.
    IF session_user = @DAEMON@ OR lower(coalesce(current_setting('anabranch.capture', true), '')) IN ('off', 'false', 'no', '0')
        AND (NOT travels OR pg_has_role(session_user, who, 'MEMBER')) THEN
        RETURN;
    END IF;
    -- Its first line is this function; a second one is what ran the statement: a function, a DO block, a trigger.
    GET DIAGNOSTICS context = PG_CONTEXT;
    IF travels THEN
        PERFORM anabranch.capture_ddl(TG_EVENT, TG_TAG, who, strpos(context, E'\n') > 0);
    ELSE
        -- It is only told. No fault of ours may be in the way of it.
        BEGIN
            PERFORM anabranch.capture_ddl(TG_EVENT, TG_TAG, NULL, strpos(context, E'\n') > 0);
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'anabranch cannot tell whether this % has changed a replicated table: %', TG_TAG, SQLERRM;
        END;
    END IF;
END $f$;
CREATE FUNCTION anabranch.capture_schema(name) RETURNS boolean LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
AS $f$
    SELECT n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'anabranch', 'anabranch_ddl', 'anabranch_join')
        AND (@INCLUDED_SCHEMAS@) AND NOT (@EXCLUDED_SCHEMAS@) FROM (SELECT $1 AS nspname) n
$f$;
CREATE FUNCTION anabranch.capture_relations() RETURNS oid[] LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
AS $f$
    SELECT ARRAY(SELECT DISTINCT coalesce(t.relid::oid, r.prrelid)
        FROM pg_publication_rel r
        JOIN pg_publication p ON p.oid = r.prpubid
        JOIN pg_class c ON c.oid = r.prrelid
        LEFT JOIN LATERAL pg_partition_tree(r.prrelid) t ON true
        WHERE p.pubname = (SELECT publication FROM anabranch.node) AND c.relnamespace <> 'anabranch'::regnamespace)
$f$;
CREATE FUNCTION anabranch.capture_ddl(event text, tag text, who name, nested boolean) RETURNS void LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $f$
DECLARE
    -- What is kept between the events of one statement. One that a function runs may be in the midst of another.
    place text := CASE WHEN nested THEN 'anabranch.within' ELSE 'anabranch.before' END;
    state jsonb := '{}';
    relations oid[];
    fresh oid[];
    -- Does the statement concern a replicated table, something else that travels, a table that is not replicated?
    of_table boolean;
    of_other boolean;
    of_local boolean;
    query text := current_query();
    statements text[];
    published oid[];
    said uuid;
BEGIN
    IF event = 'ddl_command_start' THEN
        -- What makes a table changes no other: what was before it is what is not new behind it.
        IF tag NOT IN ('CREATE TABLE', 'CREATE TABLE AS', 'SELECT INTO') THEN
            relations := anabranch.capture_relations();
            state := jsonb_build_object('relations', CASE tag
                WHEN 'DROP INDEX' THEN ARRAY(SELECT indexrelid FROM pg_index WHERE indrelid = ANY (relations))
                WHEN 'DROP STATISTICS' THEN ARRAY(SELECT oid FROM pg_statistic_ext WHERE stxrelid = ANY (relations))
                ELSE relations END::text);
            IF who IS NOT NULL AND NOT nested THEN
                SELECT state || jsonb_build_object('published', anabranch.published_tables()::text,
                    'tables', coalesce(array_agg(c.oid ORDER BY c.oid), '{}')::text, 'widths', coalesce(array_agg(c.relnatts ORDER BY c.oid), '{}')::text)
                INTO state FROM pg_class c WHERE c.oid = ANY (relations);
            END IF;
        END IF;
        PERFORM set_config(place, state::text, true);
        RETURN;
    END IF;
    state := coalesce(nullif(current_setting(place, true), ''), '{}')::jsonb;

    IF event = 'sql_drop' THEN
        -- NULL, where nobody has seen what was before: a statement that commits within itself (CONCURRENTLY).
        relations := (state ->> 'relations')::oid[];
        SELECT coalesce(bool_or(CASE
                WHEN d.object_type IN ('table', 'statistics object') THEN d.objid = ANY (relations)
                WHEN d.object_type = 'index' THEN coalesce(d.objid = ANY (relations), anabranch.capture_schema(d.schema_name::name))
                WHEN d.object_type IN ('table column', 'table constraint', 'default value', 'trigger', 'rule', 'policy') AND (d.original OR d.normal)
                    THEN to_regclass(format('%I.%I', d.address_names[1], d.address_names[2])) = ANY (relations)
                ELSE false END), false),
            coalesce(bool_or(d.original AND CASE
                WHEN d.object_type IN ('table', 'index', 'statistics object', 'table column', 'table constraint', 'default value', 'trigger', 'rule',
                    'policy', 'foreign table') THEN false
                WHEN d.object_type = 'schema' THEN anabranch.capture_schema(d.object_name::name)
                ELSE anabranch.capture_schema(d.schema_name::name) END), false),
            coalesce(bool_or((d.object_type IN ('table', 'foreign table') OR d.original AND (d.is_temporary OR tag = 'DROP INDEX'))
                AND d.objid <> ALL (relations)), false)
        INTO of_table, of_other, of_local
        FROM pg_event_trigger_dropped_objects() d
        WHERE (d.is_temporary AND d.original OR coalesce(d.schema_name, '') !~ '^pg_')
            AND coalesce(d.schema_name, '') NOT IN ('anabranch', 'anabranch_ddl', 'anabranch_join');
        state := state || jsonb_build_object('of_table', of_table, 'of_other', of_other, 'of_local', of_local);
        PERFORM set_config(place, state::text, true);
        RETURN;
    END IF;

    PERFORM set_config(place, '', true);
    fresh := '{}';
    -- Temporary tables are made by the thousand.
    IF EXISTS (SELECT FROM pg_event_trigger_ddl_commands() WHERE NOT in_extension AND schema_name IS DISTINCT FROM 'pg_temp') THEN
        relations := anabranch.capture_relations();
        fresh := ARRAY(SELECT objid FROM pg_event_trigger_ddl_commands() WHERE classid = 'pg_class'::regclass AND object_type = 'table'
            AND command_tag IN ('CREATE TABLE', 'CREATE TABLE AS', 'SELECT INTO') AND NOT in_extension);
        WITH touched AS (
            SELECT t.schema_name, t.classid, t.objid, coalesce(
                (SELECT i.indrelid FROM pg_index i WHERE i.indexrelid = t.rel),
                (SELECT d.refobjid FROM pg_depend d JOIN pg_class q ON q.oid = d.objid AND q.relkind = 'S' WHERE d.classid = 'pg_class'::regclass
                    AND d.objid = t.rel AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i') LIMIT 1), t.rel) AS rel
            FROM (SELECT schema_name, classid, objid, CASE classid
                    WHEN 'pg_class'::regclass THEN objid
                    WHEN 'pg_trigger'::regclass THEN (SELECT tgrelid FROM pg_trigger WHERE oid = objid)
                    WHEN 'pg_policy'::regclass THEN (SELECT polrelid FROM pg_policy WHERE oid = objid)
                    WHEN 'pg_rewrite'::regclass THEN (SELECT ev_class FROM pg_rewrite WHERE oid = objid)
                    WHEN 'pg_constraint'::regclass THEN (SELECT nullif(conrelid, 0) FROM pg_constraint WHERE oid = objid)
                    WHEN 'pg_statistic_ext'::regclass THEN (SELECT stxrelid FROM pg_statistic_ext WHERE oid = objid)
                    END AS rel
                FROM pg_event_trigger_ddl_commands() WHERE NOT in_extension) t)
        SELECT coalesce(bool_or(c.relkind IN ('r', 'p') AND (c.oid = ANY (relations) OR c.oid = ANY (fresh) AND c.relpersistence <> 't'
                AND anabranch.capture_schema(n.nspname) AND (@INCLUDED@) AND NOT (@EXCLUDED@))), false),
            coalesce(bool_or(CASE
                WHEN c.relkind IN ('r', 'p', 'f', 't') THEN false
                WHEN c.relkind IS NOT NULL THEN anabranch.capture_schema(n.nspname)
                WHEN t.classid = 'pg_namespace'::regclass THEN anabranch.capture_schema((SELECT nspname FROM pg_namespace WHERE oid = t.objid))
                    OR EXISTS (SELECT FROM pg_class q WHERE q.relnamespace = t.objid AND q.oid = ANY (relations))
                ELSE anabranch.capture_schema(t.schema_name::name) END), false)
        INTO of_table, of_other
        FROM touched t LEFT JOIN pg_class c ON c.oid = t.rel LEFT JOIN pg_namespace n ON n.oid = c.relnamespace;
    END IF;
    of_table := coalesce(of_table, false) OR coalesce((state ->> 'of_table')::boolean, false);
    of_other := coalesce(of_other, false) OR coalesce((state ->> 'of_other')::boolean, false);
    of_local := coalesce((state ->> 'of_local')::boolean, false);
    -- What is published since its snapshot such a transaction does not see.
    IF who IS NOT NULL AND NOT of_table AND relations IS NOT NULL AND current_setting('transaction_isolation') IN ('repeatable read', 'serializable')
        AND EXISTS (SELECT FROM pg_get_publication_tables((SELECT publication FROM anabranch.node)) g WHERE g.relid <> ALL (relations)
            AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = g.relid AND c.relnamespace = 'anabranch'::regnamespace)) THEN
        RAISE EXCEPTION 'this % is in a transaction that began before a table was published: whether it is of that one cannot be told', tag
            USING ERRCODE = '40001', HINT = 'Run it again, or under READ COMMITTED.';
    END IF;

    -- It makes what is there anew, of this server's own.
    IF tag IN ('REFRESH MATERIALIZED VIEW', 'REINDEX', 'CLUSTER') THEN
        RETURN;
    END IF;
    IF who IS NULL THEN
        IF of_table THEN
            RAISE WARNING 'this % stays at this node, and a table that is replicated, or is to be, differs from now on: DDL of role % does not travel', tag,
                current_setting('anabranch.who', true)
                USING HINT = 'SET ROLE to one of ddl.roles first, or run it at every node by itself; SET anabranch.capture = off says that this is meant.';
        END IF;
        RETURN;
    END IF;
    IF NOT of_table AND NOT of_other THEN
        IF NOT nested AND (tag IN ('GRANT', 'REVOKE', 'ALTER DEFAULT PRIVILEGES')
            OR tag ~ '(EXTENSION|SERVER|WRAPPER|MAPPING|PUBLICATION|SUBSCRIPTION|LANGUAGE|CAST|TRANSFORM|ACCESS METHOD)$') THEN
            RAISE NOTICE '% stays at this node', tag
                USING HINT = 'It speaks of what each server has for itself, such as roles. If it fits every node: anabranch.replicate_ddl(''...'').';
        END IF;
        RETURN;
    END IF;
    IF nested THEN
        RAISE EXCEPTION 'this % is run by a function or a DO block: it cannot be captured, and would change this node alone', tag USING ERRCODE = '0A000',
            HINT = 'Run it as a statement by itself, or there by PERFORM anabranch.replicate_ddl(''...''). If it is to stay at this node: SET anabranch.capture = off.';
    END IF;
    IF current_setting('standard_conforming_strings') = 'off' AND strpos(query, E'\\') > 0 THEN
        RAISE EXCEPTION 'this % has a backslash, which reads otherwise at the other nodes: it cannot be captured', tag USING ERRCODE = '0A000',
            HINT = 'SET standard_conforming_strings = on, and write strings with backslashes as E''...''.';
    END IF;
    statements := anabranch.statements(query, 1);
    IF cardinality(statements) IS DISTINCT FROM 1 THEN
        RAISE EXCEPTION 'this % is one of several statements in one string: it cannot be captured', tag USING ERRCODE = '0A000',
            HINT = 'Send each statement by itself (psql -f does, and psql -c for each), or by anabranch.replicate_ddl(''...''). If it is to stay at this node: SET anabranch.capture = off.';
    END IF;
    IF statements[1] ~* E'@CONCURRENTLY@' THEN
        RAISE NOTICE 'this % stays at this node: CONCURRENTLY cannot run in a transaction, so it cannot be replicated', tag
            USING HINT = 'Run it at every node by itself.';
        RETURN;
    END IF;
    IF of_table AND (tag = 'ALTER SEQUENCE' AND statements[1] ~* E'\\m(restart|increment|start)\\M'
        OR tag = 'ALTER TABLE' AND statements[1] ~* E'\\m(restart(\\s+with)?\\s+[-+0-9]|set\\s+increment)') THEN
        RAISE EXCEPTION 'this % would give all nodes the same next ids', tag USING ERRCODE = '0A000',
            HINT = 'SET anabranch.capture = off, run it at each node, then `anabranch sequences apply` there.';
    END IF;
    IF of_local THEN
        RAISE EXCEPTION 'this % takes away tables that are replicated, and others that are not', tag USING ERRCODE = '0A000',
            HINT = 'Drop those that are not replicated first, by a statement of their own.';
    END IF;
    PERFORM anabranch.check_ddl(query);
    PERFORM anabranch.check_new_columns(coalesce((state ->> 'tables')::oid[], '{}'), coalesce((state ->> 'widths')::int2[], '{}'));
    published := coalesce((state ->> 'published')::oid[],
        ARRAY(SELECT p FROM unnest(anabranch.published_tables()) p WHERE p <> ALL (fresh)));
    said := anabranch.note_ddl(who, query, current_setting('anabranch.path'),
        ARRAY(SELECT c.oid FROM pg_class c WHERE c.relkind IN ('r', 'p') AND c.oid <> ALL (fresh)));
    PERFORM anabranch.note_columns(coalesce((state ->> 'tables')::oid[], '{}'), coalesce((state ->> 'widths')::int2[], '{}'), said);
    PERFORM anabranch.check_new_rows(published);
END $f$;
CREATE EVENT TRIGGER anabranch_capture_1_start ON ddl_command_start EXECUTE FUNCTION anabranch.capture_who();
CREATE EVENT TRIGGER anabranch_capture_2_start ON ddl_command_start EXECUTE FUNCTION anabranch.capture();
CREATE EVENT TRIGGER anabranch_capture_1_drop ON sql_drop EXECUTE FUNCTION anabranch.capture_who();
CREATE EVENT TRIGGER anabranch_capture_2_drop ON sql_drop EXECUTE FUNCTION anabranch.capture();
CREATE EVENT TRIGGER anabranch_capture_1_end ON ddl_command_end EXECUTE FUNCTION anabranch.capture_who();
CREATE EVENT TRIGGER anabranch_capture_2_end ON ddl_command_end EXECUTE FUNCTION anabranch.capture();
REVOKE ALL ON FUNCTION anabranch.capture_who(), anabranch.capture(), anabranch.capture_schema(name), anabranch.capture_relations(),
    anabranch.capture_ddl(text, text, name, boolean) FROM PUBLIC;
